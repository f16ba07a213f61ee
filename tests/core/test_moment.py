"""Σ of few wide features gives what the dense one gives, and nothing is ever d x d."""

import dataclasses

import mpmath
import pytest
import torch
from support.remaps import make_prototypes, randn
from torch.utils._python_dispatch import TorchDispatchMode

from more_hf.core.errors import PrototypeError
from more_hf.core.moment import Moment
from more_hf.core.prototypes import PrototypeFitter, Prototypes
from more_hf.core.remap import Remap


pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 90
FORGET, TARGETS = ["p0", "p1"], [["p2", "p3"], ["p3", None]]
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


def features(n=40, d=WIDTH, seed=5):
    """Not centred, and of unlike directions."""
    return randn(n, d, seed=seed) * torch.logspace(0, -1, d, dtype=torch.float64) + randn(d, seed=seed + 1)


def problem(matrix, count=40, d=WIDTH):
    counts = torch.ones(7, dtype=torch.int64)
    return dataclasses.replace(make_prototypes(d, 7), counts=counts, second_moment=matrix, moment_count=count)


def both(z, d=WIDTH):
    """The same prototypes with Σ thin and dense."""
    thin, dense = (
        PrototypeFitter(d, ["one"], thin=thin).update(z[:1], torch.zeros(1).long()).update_moment(z)
        for thin in (True, False)
    )
    return tuple(problem(fitter.prototypes.second_moment, len(z), d) for fitter in (thin, dense))


def worst(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("solver", ["covariance", "soft"])
@pytest.mark.parametrize("shrinkage", [1e-4, 1e-1])
@pytest.mark.parametrize("n", [1, 40, WIDTH - 1])
def test_the_dual_is_that_of_the_dense_metric(solver, shrinkage, n):
    thin, dense = (
        Remap.fit(part, FORGET, TARGETS, solver=solver, shrinkage=shrinkage) for part in both(features(n))
    )
    assert thin.prototypes.moment.is_thin
    assert not dense.prototypes.moment.is_thin
    # The dense one rounds the directions in which there is no feature to ε of the largest eigenvalue.
    values = torch.linalg.eigvalsh(dense.prototypes.second_moment)
    condition = float(values[-1] / (shrinkage * values.mean()))
    assert worst(thin.dual, dense.dual) < max(1e-12, 1e-16 * condition)
    found, expected = thin.verify(), dense.verify()
    for key in ("ordinary_moved", "rank", *(["way_left"] if solver == "soft" else [])):
        assert found[key] == pytest.approx(expected[key], rel=1e-8, abs=1e-6)
    # and it is the metric of these features, not another's
    other = Remap.fit(both(features(n, seed=8))[0], FORGET, TARGETS, solver=solver, shrinkage=shrinkage)
    assert worst(other.dual, dense.dual) > 1e-3


def test_the_dual_is_the_formula_in_fifty_digits():
    """D = (Pᵀ Σ⁻¹ P)⁻¹ Pᵀ Σ⁻¹."""
    d, n = 20, 6
    z = features(n, d)
    prototypes, _ = both(z, d)
    with mpmath.workdps(50):
        P, Z = mpmath.matrix(prototypes.matrix.tolist()), mpmath.matrix(z.tolist())
        sigma = Z.T * Z / n
        shrunk = sigma + mpmath.mpf(1e-4) * sum(sigma[i, i] for i in range(d)) / d * mpmath.eye(d)
        solved = shrunk**-1 * P
        expected = torch.tensor(((P.T * solved) ** -1 * solved.T).tolist(), dtype=torch.float64)
    assert worst(Remap.fit(prototypes, FORGET, TARGETS, solver="covariance").dual, expected) < 1e-12


def test_what_a_fitter_keeps():
    z, labels = features(), torch.zeros(1).long()
    parts = [z[:7], z[7:7], z[7:30], z[30:]]
    fitter = PrototypeFitter(WIDTH, ["one"], thin=True).update(z[:1], labels)
    for part in parts:
        fitter.update_moment(part)
    assert torch.equal(fitter.totals.moment, z)
    assert torch.allclose(fitter.prototypes.moment.dense, z.T @ z / 40, **ROUNDING)
    # one feature short of d is thin, d features are a sum, however they arrive
    for rows, thin in ((49, True), (50, False), (90, False), (200, False)):
        more = features(rows, seed=9)
        whole = torch.cat([z, more])
        for split in ((rows,), (10, rows - 10)):
            fitter = PrototypeFitter(WIDTH, ["one"], thin=True).update(z[:1], labels).update_moment(z)
            for part in more.split(split):
                fitter.update_moment(part)
            found = fitter.prototypes
            assert found.moment.is_thin == thin
            assert found.moment_count == len(whole)
            assert torch.allclose(found.moment.dense, whole.T @ whole / len(whole), **ROUNDING)


@pytest.mark.parametrize("sizes", [(20, 30), (60, 70), (20, 200), (200, 20), (200, 300)])
def test_sum_and_difference(sizes):
    parts = [features(n, seed=n) for n in sizes]
    first, second = (both(part)[0].moment for part in parts)
    whole = torch.cat(parts)
    found = first + second
    assert torch.allclose(found.dense, whole.T @ whole / len(whole), **ROUNDING)
    assert found.is_thin == (len(whole) < WIDTH)
    less = found - second
    assert torch.allclose(less.dense, first.dense, **ROUNDING)
    assert less.count == sizes[0]
    assert less.is_thin == found.is_thin
    assert not torch.allclose(less.dense, found.dense, rtol=1e-2)


def test_saved_and_loaded(tmp_path):
    thin = both(features(20))[0]
    assert thin.moment.is_thin
    thin.save(tmp_path / "prototypes.safetensors")
    loaded = Prototypes.load(tmp_path / "prototypes.safetensors")
    assert torch.equal(loaded.second_moment, thin.second_moment)
    assert loaded.moment_count == 20


class Largest(TorchDispatchMode):
    """The most values that any result has."""

    values = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor):
                self.values = max(self.values, part.numel())
        return result


@pytest.mark.parametrize("solver", ["pinv", "covariance", "soft"])
def test_nothing_is_as_large_as_the_dense_metric(solver):
    d, n = 1000, 30
    parts = [problem(part.second_moment, n, d) for part in both(features(n, d), d)]
    largest = []
    for part in parts:
        with Largest() as seen:
            remap = Remap.fit(part, FORGET, TARGETS, solver=solver)
            remap.verify()
            part.moment + Moment(part.second_moment[:3], 3)  # thin with thin, and else dense
        largest.append(seen.values)
    assert largest[0] <= 2 * n * d
    assert largest[1] >= d * d


@pytest.mark.parametrize("shrinkage", [0.0, 1e-4])
def test_a_thin_metric_is_singular_unless_something_is_added(shrinkage):
    thin, _ = both(features())
    if shrinkage:
        Remap.fit(thin, FORGET, TARGETS, solver="covariance", shrinkage=shrinkage)
        return
    with pytest.raises(PrototypeError, match="larger `shrinkage`"):
        Remap.fit(thin, FORGET, TARGETS, solver="covariance", shrinkage=shrinkage)


def test_a_thin_metric_that_is_not_finite():
    with pytest.raises(PrototypeError, match="not finite"):
        Remap.fit(problem(torch.full((3, WIDTH), torch.nan)), FORGET, TARGETS, solver="covariance")


@pytest.mark.parametrize("n", [20, 200])
def test_a_system_is_solved_and_only_with_a_metric(n):
    moment, X = both(features(n))[0].moment, randn(WIDTH, 3, seed=1)
    assert moment.is_thin == (n < WIDTH)
    shrunk = moment.dense + 1e-3 * moment.trace / WIDTH * torch.eye(WIDTH).double()
    assert worst(moment.solve(X, 1e-3), torch.linalg.solve(shrunk, X)) < 1e-11
    assert worst(moment.solve(X, 1e-2), torch.linalg.solve(shrunk, X)) > 1e-2
    with pytest.raises(PrototypeError, match="singular"):
        Moment(torch.diag(torch.tensor([1.0, 0.0])).double(), 1).solve(X[:2], 0.0)
    with pytest.raises(PrototypeError, match="not finite"):
        Moment(torch.nan * moment.dense, n).solve(X, 1e-3)
