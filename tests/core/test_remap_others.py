"""The edit beside others: UCE, the least movement, and what scale and rotation must not change."""

import dataclasses

import numpy as np
import pytest
import torch
from support.remaps import SOLVERS, close, make_prototypes, make_remap, randn

from more_hf.core.prototypes import PrototypeFitter
from more_hf.core.remap import Remap


pytestmark = pytest.mark.usefixtures("one_thread")  # small matrices: threads only wait for each other


def uce(weight, forget, targets, remain, strength):
    """Unified Concept Editing in closed form: keep W on `remain`, send W c to W g, with a ridge towards W."""
    eye = torch.eye(weight.shape[1], dtype=torch.float64)
    left, right = strength * weight, strength * eye
    for c, g in zip(forget, targets, strict=True):
        left, right = left + torch.outer(weight @ g, c), right + torch.outer(c, c)
    for r in remain:
        left, right = left + torch.outer(weight @ r, r), right + torch.outer(r, r)
    return torch.linalg.solve(right, left, left=False)


def test_one_expert_is_uce_as_its_ridge_vanishes():
    remap, weight = make_remap(num_experts=1), randn(9, 12)
    columns = remap.prototypes.matrix.T
    merged = remap.merged(weight, 0)

    def error(strength, targets):
        edited = uce(weight, columns[:2], targets, columns[2:], strength)
        return float((edited - merged).norm() / merged.norm())

    errors = [error(10.0**-power, columns[remap.targets[0]]) for power in (3, 5, 7, 9)]
    # P has singular values down to 0.1, so the ridge costs about strength / 0.1².
    assert all(late < 0.05 * early for early, late in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-6
    wrong = [2 + (t - 1) % 5 for t in remap.targets[0].tolist()]
    assert error(1e-9, columns[wrong]) > 0.1
    assert (merged - weight).norm() > 0.1 * weight.norm()


def test_covariance_is_the_exact_edit_that_moves_features_least():
    features = randn(2000, 16) * torch.logspace(0, -1, 16, dtype=torch.float64) + randn(16, seed=5)
    fitter = PrototypeFitter(16, [f"p{i}" for i in range(5)])
    fitter.update(randn(5, 16, seed=6), torch.arange(5)).update_moment(features)
    P = fitter.prototypes.matrix
    pinv, least = (
        Remap.fit(fitter.prototypes, ["p0", "p1"], [["p2", "p3"]], solver=solver, shrinkage=0.0)
        for solver in SOLVERS
    )

    def moved(dual):
        return float((features @ dual[:2].T @ least.shift().T).square().sum(1).mean())

    def read(dual):
        return float((features @ dual[:2].T).square().sum(1).mean())

    for remap in (pinv, least):
        close(remap.apply(P.T[:2]), P.T[2:4], 1e-12)
    change = (least.apply(features) - features).square().sum(1).mean()
    assert moved(least.dual) == pytest.approx(float(change))
    assert moved(least.dual) < 0.5 * moved(pinv.dual)
    assert read(least.dual) < 0.5 * read(pinv.dual)
    # Every other exact dual is D + N with N P = 0.
    left = torch.eye(16, dtype=torch.float64) - P @ torch.linalg.pinv(P)
    for seed in range(20):
        for size in (1e-3, 1e-1, 1.0):
            other = least.dual + size * randn(5, 16, seed=100 + seed) @ left
            close(other @ P, torch.eye(5, dtype=torch.float64), 1e-12)
            assert read(other) > read(least.dual)
            assert moved(other) > moved(least.dual)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scale_of_other_prototypes_does_not_matter(solver):
    prototypes, z = make_prototypes(12, 6), randn(5, 12)
    scales = torch.tensor([1, 1, 1, 1e4, 1e-4, 1], dtype=torch.float64)
    scaled = dataclasses.replace(prototypes, matrix=prototypes.matrix * scales)
    fits = [Remap.fit(p, ["p0", "p1"], [["p2", "p5"]], solver=solver) for p in (prototypes, scaled)]

    close(fits[1].apply(z), fits[0].apply(z), 1e-11)
    assert fits[1].condition_number == pytest.approx(fits[0].condition_number)
    assert (fits[0].apply(z) - z).norm() > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_rotation_of_the_features_rotates_the_edit(solver):
    prototypes, z, rotation = make_prototypes(12, 6), randn(5, 12), torch.linalg.qr(randn(12, 12, seed=8))[0]
    moment = rotation @ prototypes.second_moment @ rotation.T
    rotated = dataclasses.replace(prototypes, matrix=rotation @ prototypes.matrix, second_moment=moment)
    fits = [Remap.fit(p, ["p0", "p1"], [["p2", "p5"]], solver=solver) for p in (prototypes, rotated)]

    close(fits[1].apply(z @ rotation.T), fits[0].apply(z) @ rotation.T, 1e-11)
    assert (fits[1].apply(z) - fits[0].apply(z)).norm() > 0.1


def test_condition_number_is_of_unit_columns():
    assert make_remap(condition=1.0).condition_number == pytest.approx(1)
    remap = make_remap(condition=1e4)
    unit = remap.prototypes.matrix / remap.prototypes.matrix.norm(dim=0)

    assert remap.condition_number == pytest.approx(np.linalg.cond(unit.numpy()), rel=1e-6)
    assert remap.condition_number > 1e3


def test_fit_and_verify_leave_prototypes_and_random_state_alone():
    prototypes, state = make_prototypes(12, 6), torch.get_rng_state()
    kept, moment = prototypes.matrix.clone(), prototypes.second_moment.clone()
    for solver in SOLVERS:
        Remap.fit(prototypes, ["p0"], [["p1"]], solver=solver).verify()

    assert torch.equal(prototypes.matrix, kept)
    assert torch.equal(prototypes.second_moment, moment)
    assert torch.equal(torch.get_rng_state(), state)
