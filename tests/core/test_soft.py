"""The soft solver against its objective, and against the closed form of the literature."""

import pytest
import torch
from support.remaps import SHRINKAGE, make_prototypes, randn

from more_hf import PrototypeError
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap


FORGET = ["p0", "p1", "p2"]
TARGETS = [["p3", "p4", "p3"]]
TIGHT = {"rtol": 1e-8, "atol": 1e-9}


def fit(prototypes, forget=FORGET, targets=TARGETS, **options):
    return Remap.fit(prototypes, forget, targets, **{"solver": "soft", **options})


def shrunk(prototypes):
    moment = prototypes.second_moment
    return moment + SHRINKAGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def edit(remap):
    return torch.eye(len(remap.prototypes.matrix), dtype=torch.float64) + remap.shift() @ remap.D_F


def objective(E, remap, softness):
    """What `softness` weighs, written out."""
    P, sigma = remap.prototypes, shrunk(remap.prototypes)
    F = P.matrix[:, list(remap.forget)]
    left = ((E @ F - F - remap.shift()) / F.norm(dim=0)).square().sum() / F.shape[1]
    change = E - torch.eye(len(E), dtype=E.dtype)
    return left + softness * (change @ sigma @ change.T).trace() / P.second_moment.trace()


@pytest.mark.parametrize("softness", [0.1, 1.0, 10.0])
def test_no_edit_that_keeps_the_others_is_better(softness):
    remap = fit(make_prototypes(12, 7), softness=softness)
    E, least = edit(remap), objective(edit(remap), remap, softness)
    remain = remap.remain
    free = torch.eye(12, dtype=torch.float64) - remain @ torch.linalg.pinv(remain)
    for seed in range(20):
        other = E + 1e-2 * randn(12, 12, seed=seed) @ free
        assert torch.allclose(other @ remain, remain, **TIGHT)
        assert objective(other, remap, softness) > least


def test_its_reading_is_the_ridge_with_hard_constraints():
    """D_F = (Fᵀ A F + μI)⁻¹ Fᵀ A with A = Σ⁻¹ − Σ⁻¹ R (Rᵀ Σ⁻¹ R)⁻¹ Rᵀ Σ⁻¹ and columns F of unit norm."""
    prototypes = make_prototypes(12, 7)
    remap = fit(prototypes, softness=0.5)
    inverse, R = torch.linalg.inv(shrunk(prototypes)), remap.remain
    A = inverse - inverse @ R @ torch.linalg.inv(R.T @ inverse @ R) @ R.T @ inverse
    norms = prototypes.matrix[:, :3].norm(dim=0)
    F = prototypes.matrix[:, :3] / norms
    mu = 3 * 0.5 / prototypes.second_moment.trace()
    expected = torch.linalg.inv(F.T @ A @ F + mu * torch.eye(3)) @ F.T @ A / norms[:, None]
    assert torch.allclose(remap.D_F, expected, **TIGHT)
    exact = fit(prototypes, solver="covariance").D_F
    assert not torch.allclose(remap.D_F, exact, rtol=1e-3)  # and it is not the exact one


def test_between_the_exact_edit_and_none():
    prototypes = make_prototypes(12, 7)
    exact = fit(prototypes, solver="covariance")
    assert torch.allclose(fit(prototypes, softness=1e-12).D_F, exact.D_F, rtol=1e-5, atol=1e-7)
    softer = [fit(prototypes, softness=s).verify() for s in (0.1, 1.0, 10.0)]
    left, moved = ([found[key] for found in softer] for key in ("way_left", "ordinary_moved"))
    assert left == sorted(left)
    assert moved == sorted(moved, reverse=True)
    assert 0 < left[0] < left[-1] < 1
    assert exact.verify()["ordinary_moved"] > moved[0]


def test_what_stays_is_exact_and_the_rest_is_no_guarantee():
    found = fit(make_prototypes(12, 7)).verify()
    assert found["remain_fixed"] < 1e-9
    assert not {"forget_to_target", "idempotent", "nothing_left"} & found.keys()
    assert fit(make_prototypes(12, 7), solver="covariance").verify()["nothing_left"] < 1e-9


def test_more_concepts_than_dimensions():
    few = make_prototypes(6, 5)
    names = tuple(f"c{i}" for i in range(20))
    many = Prototypes(
        torch.cat([few.matrix, randn(6, 20)], 1), few.names + names, torch.ones(25), few.second_moment
    ).without(["p1", "p2", "p3"])
    with pytest.raises(PrototypeError, match="6 dimensions"):
        fit(many, names, [["p0"] * 20], solver="covariance")
    found = fit(many, names, [["p0"] * 20]).verify()
    assert found["remain_fixed"] < 1e-9
    assert 0 < found["way_left"] < 1


def test_more_targets_than_dimensions():
    """They cannot all stay exactly, so they move a little, as ordinary features do; the constants stay."""
    few = make_prototypes(10, 2)
    names = tuple(f"c{i}" for i in range(12)) + tuple(f"t{i}" for i in range(12))
    matrix = torch.cat([few.matrix, randn(10, 24)], 1)
    many = Prototypes(matrix, few.names + names, torch.ones(26), few.second_moment)
    remap = fit(many, names[:12], [names[12:]])
    found = remap.verify()
    assert found["remain_fixed"] < 1e-9
    assert 0 < found["targets_moved"] < 10
    assert 0 < found["way_left"]
    directions, share = remap.removed(most=0.5)
    assert (edit(remap) @ directions).norm(dim=0).max() <= share + 1e-9
    assert "targets_moved" not in fit(make_prototypes(14, 7)).verify()


def test_a_target_that_is_the_concept_is_refused():
    prototypes = make_prototypes(12, 7)
    P = prototypes.matrix.clone()
    P[:, 3] = 2 * P[:, 0]
    same = Prototypes(P, prototypes.names, prototypes.counts, prototypes.second_moment)
    with pytest.raises(PrototypeError, match="'p0'"):
        fit(same)


@pytest.mark.parametrize("softness", [0.01, 1.0])
def test_what_it_removes(softness):
    remap = fit(make_prototypes(12, 7), softness=softness)
    E, span = edit(remap), torch.linalg.qr(remap.shift())[0]
    shares = torch.linalg.svdvals(E @ span)  # of every direction between a forget prototype and its target
    for most in (0.0, 0.2, float(shares[1]) + 1e-9, 10.0):
        directions, share = remap.removed(most)
        expected = shares[shares <= max(most, float(shares[-1]))]
        assert directions.shape[1] == len(expected)
        assert share == pytest.approx(float(expected[0]))
        assert torch.allclose(directions.T @ directions, torch.eye(len(expected), dtype=torch.float64))
        assert torch.allclose(span @ span.T @ directions, directions)
        assert torch.allclose((E @ directions).norm(dim=0).sort().values, expected.sort().values)


def test_an_exact_edit_removes_the_whole_way():
    exact = fit(make_prototypes(12, 7), solver="covariance")
    directions, share = exact.removed()
    assert share == 0
    assert torch.equal(directions, exact.shift())
    assert torch.allclose(edit(exact) @ directions, torch.zeros(12, 3, dtype=torch.float64), atol=1e-9)
