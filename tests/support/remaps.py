"""Prototypes and remaps for tests of the method, and references for them that share no code with it."""

import math

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap


EXAMPLES = settings(derandomize=True, deadline=None, database=None, max_examples=50)
SOLVERS = ("pinv", "covariance")
SHRINKAGE = 1e-4  # the default of Remap.fit


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_prototypes(d, k, condition=10.0, seed=0):
    """p0, p1, … whose matrix has this condition number; the second moment is not the identity."""
    left, right = torch.linalg.qr(randn(d, k, seed=seed))[0], torch.linalg.qr(randn(k, k, seed=seed + 1))[0]
    P = left * torch.logspace(0, -math.log10(condition), k, dtype=torch.float64) @ right.T
    spread = torch.logspace(0, -1, d, dtype=torch.float64)
    features = randn(2 * d, d, seed=seed + 2) * spread + randn(d, seed=seed + 3)
    names = tuple(f"p{i}" for i in range(k))
    return Prototypes(P, names, torch.ones(k), features.T @ features / len(features))


def make_remap(d=12, k=7, f=2, num_experts=3, solver="pinv", condition=10.0, seed=0):
    """Forgets p0 … p(f−1); targets are drawn from all others."""
    drawn = torch.randint(f, k, (num_experts, f), generator=torch.Generator().manual_seed(seed)).tolist()
    targets = [[f"p{t}" for t in expert] for expert in drawn]
    prototypes, forget = make_prototypes(d, k, condition, seed), [f"p{i}" for i in range(f)]
    return Remap.fit(prototypes, forget, targets, solver=solver)


def metric(prototypes, solver):
    d = len(prototypes.matrix)
    if solver == "pinv":
        return np.eye(d)
    moment = prototypes.second_moment.numpy()
    return moment + SHRINKAGE * np.trace(moment) / d * np.eye(d)


def condition(prototypes, solver):
    """Of the matrix that the dual inverts: P with unit columns, whitened."""
    unit = prototypes.matrix / prototypes.matrix.norm(dim=0)
    return np.linalg.cond(np.linalg.solve(np.linalg.cholesky(metric(prototypes, solver)), unit.numpy()))


def tolerance(remap):
    """Through an SVD, D P − I is about d · 2e-16 · condition; d ≤ 64, the rest is slack."""
    return 1e-13 * condition(remap.prototypes, remap.solver)


def dense_experts(remap):
    """Every E as a `(d, d)` matrix, from the generalised least squares formula."""
    P, S_inv = remap.prototypes.matrix.numpy(), np.linalg.inv(metric(remap.prototypes, remap.solver))
    D = np.linalg.inv(P.T @ S_inv @ P) @ P.T @ S_inv
    experts = []
    for targets in remap.targets.tolist():
        E = np.eye(len(P))
        for p, t in zip(remap.forget, targets, strict=True):
            E += np.outer((0 if t == -1 else P[:, t]) - P[:, p], D[p])
        experts.append(torch.from_numpy(E))
    return torch.stack(experts)


def close(actual, expected, tol):
    """Equal up to `tol`, as a fraction of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol * max(1.0, float(expected.abs().max())))
    return True


@st.composite
def remaps(draw, conditions=(1.0, 1e2, 1e4)):
    d, f = draw(st.integers(8, 64)), draw(st.integers(1, 4))
    return make_remap(
        d=d,
        k=draw(st.integers(f + 1, d - 1)),
        f=f,
        num_experts=draw(st.integers(1, 5)),
        solver=draw(st.sampled_from(SOLVERS)),
        condition=draw(st.sampled_from(conditions)),
        seed=draw(st.integers(0, 10_000)),
    )
