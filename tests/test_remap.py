"""The guarantees G1 to G5 and G7 under their conditions, against references that share no code with the method."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from more_hf.errors import PrototypeError
from more_hf.prototypes import PrototypeFitter, Prototypes
from more_hf.remap import Remap, draw_experts


EXAMPLES = settings(derandomize=True, deadline=None, database=None, max_examples=50)
SOLVERS = ("pinv", "covariance")
SHRINKAGE = 1e-4  # the default of Remap.fit
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These matrices are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_prototypes(d, k, condition=10.0, seed=0):
    """k prototypes p0, p1, … whose matrix has this condition number, and a second moment that is not the identity."""
    left, right = torch.linalg.qr(randn(d, k, seed=seed))[0], torch.linalg.qr(randn(k, k, seed=seed + 1))[0]
    P = left * torch.logspace(0, -math.log10(condition), k, dtype=torch.float64) @ right.T
    features = randn(2 * d, d, seed=seed + 2) * torch.logspace(0, -1, d, dtype=torch.float64) + randn(d, seed=seed + 3)
    return Prototypes(P, tuple(f"p{i}" for i in range(k)), torch.ones(k), features.T @ features / len(features))


def make_remap(d=12, k=7, f=2, num_experts=3, solver="pinv", condition=10.0, seed=0):
    """Forgets p0 … p(f−1); targets are drawn from all others."""
    drawn = torch.randint(f, k, (num_experts, f), generator=torch.Generator().manual_seed(seed)).tolist()
    targets = [[f"p{t}" for t in expert] for expert in drawn]
    return Remap.fit(make_prototypes(d, k, condition, seed), [f"p{i}" for i in range(f)], targets, solver=solver)


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
    """A pseudo-inverse through an SVD leaves D P − I at about d · 2e-16 · condition; d ≤ 64, the rest is slack."""
    return 1e-13 * condition(remap.prototypes, remap.solver)


def dense_experts(remap):
    """Every E as a `(d, d)` matrix, from the generalised least squares formula as it is written in the design."""
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


# --- the guarantees -------------------------------------------------------------------------------------------------


@EXAMPLES
@given(remaps())
def test_g1_prototypes_go_where_they_should(remap):
    P, f, tol = remap.prototypes.matrix, remap.rank, tolerance(remap)
    for expert in range(remap.num_experts):
        after = remap.apply(P.T, expert).T

        close(after[:, :f], P[:, remap.targets[expert]], tol)
        close(after[:, f:], P[:, f:], tol)
        # No two prototypes are closer than √2 times the smallest singular value of P.
        assert ((after - P)[:, :f].norm(dim=0) > torch.linalg.svdvals(P)[-1]).all()
    close(remap.apply(P.T).T[:, :f], P[:, remap.targets].mean(1), tol)


@EXAMPLES
@given(remaps())
def test_g2_idempotent_and_of_rank_f(remap):
    eye = torch.eye(len(remap.prototypes.matrix), dtype=torch.float64)
    for expert in range(remap.num_experts):
        E = remap.apply(eye, expert).T

        assert (E @ E - E).norm() < tolerance(remap) * E.norm()
        # I − E is then a projection, whose singular values are 0 or at least 1.
        assert int((torch.linalg.svdvals(eye - E) > 0.5).sum()) == remap.rank


@EXAMPLES
@given(remaps())
def test_g3_nothing_is_left_to_read(remap):
    z, D_F, tol = randn(16, len(remap.prototypes.matrix)), remap.D_F, tolerance(remap)
    first = remap.apply(z, 0)

    assert (first @ D_F.T).norm() < tol * D_F.norm() * first.norm()
    assert (z @ D_F.T).norm() > 1e-2 * D_F.norm()
    for expert in [*range(remap.num_experts), None]:
        close(remap.apply(first, expert), first, tol * float(remap.shift(expert).norm() * D_F.norm()))
    assert (first - z).norm() > 1e-2 * z.norm()


@EXAMPLES
@given(remaps())
def test_g4_a_feature_moves_by_what_it_holds(remap):
    P, f = remap.prototypes.matrix, remap.rank
    z = randn(16, len(P))
    read = z @ remap.D_F.T
    without = z - read @ P[:, :f].T  # D_F P_F = I, so this holds no forget prototype
    for expert in range(remap.num_experts):
        shift = P[:, remap.targets[expert]] - P[:, :f]

        close(remap.apply(z, expert) - z, read @ shift.T, tolerance(remap) * float(z.norm()))
        close(remap.apply(without, expert), without, tolerance(remap) * float(read.norm() * shift.norm() + 1))
        assert (remap.apply(z, expert) - z).norm() > 1e-2


def softmax_regression(features, labels, num_classes, l2):
    """Weights `(num_classes, d)` and biases at the minimum, in float64 from a random start."""
    z = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    weight = (0.1 * randn(num_classes, z.shape[1], seed=9)).requires_grad_()

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(z @ weight.T, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer = torch.optim.LBFGS(
        [weight], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    optimizer.step(loss)
    loss()
    assert weight.grad.abs().max() < 1e-8
    return weight.detach()[:, :-1], weight.detach()[:, -1]


def auc(positive, negative):
    """Chance that a positive scores higher, ties counted half, at a resolution of 1e-4."""
    difference = (positive[:, None] - negative).div(1e-4).round()
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def probe_f_against_t(counts, l2):
    """Fit a probe before and after; for both return w_f − w_t, and s_f − s_t on the features of f and of t."""
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    features = randn(len(labels), 6, seed=3) + 1.5 * randn(4, 6, seed=4)[labels]  # classes overlap: a minimiser exists
    remap = Remap.fit(PrototypeFitter(6, "ftrs").update(features, labels).prototypes, ["f"], [["t"]])
    for z in (features, remap.apply(features)):
        weight, bias = softmax_regression(z, labels, 4, l2)
        score = z @ (weight[0] - weight[1]) + bias[0] - bias[1]
        yield weight[0] - weight[1], score[labels == 0], score[labels == 1]


def test_g5_a_linear_probe_cannot_tell_f_from_t():
    (before, *scores_before), (after, *scores_after) = probe_f_against_t(counts=[60, 60, 50, 70], l2=1e-2)

    # A gradient of 1e-8 under a curvature of at least l2 leaves the minimiser within 1e-6 per weight.
    assert after.abs().max() < 1e-5
    assert auc(*scores_after) == 0.5
    assert before.abs().max() > 0.1
    assert auc(*scores_before) > 0.9


def test_g5_without_l2_the_scores_differ_by_the_log_of_the_counts():
    (_, *scores_before), (_, *scores_after) = probe_f_against_t(counts=[40, 80, 60, 60], l2=0.0)

    for score in scores_after:
        close(score, torch.full_like(score, math.log(40 / 80)), 1e-5)
    assert auc(*scores_after) == 0.5
    assert auc(*scores_before) > 0.9


@EXAMPLES
@given(
    d=st.integers(16, 64),
    f=st.integers(1, 4),
    condition=st.sampled_from([1.0, 1e2, 1e4]),
    solver=st.sampled_from(SOLVERS),
    seed=st.integers(0, 10_000),
)
def test_g7_two_experts_give_the_input_back_and_one_does_not(d, f, condition, solver, seed):
    forget, first, second = ([f"p{i}" for i in range(n * f, n * f + f)] for n in range(3))
    remap = Remap.fit(make_prototypes(d, 3 * f, condition, seed), forget, [first, second], solver=solver)
    z, eye = randn(d, seed=seed), torch.eye(d, dtype=torch.float64)
    one, two = remap.apply(eye, 0).T, remap.apply(eye, 1).T
    both = torch.cat([one, two])
    asked = torch.cat([remap.apply(z, 0), remap.apply(z, 1)])

    recovered = torch.linalg.lstsq(both, asked).solution
    assert (recovered - z).norm() < 1e-13 * torch.linalg.cond(both) * z.norm()
    assert int((torch.linalg.svdvals(one) > 0.1 * tolerance(remap)).sum()) == d - f
    # p_f − p_t: the first expert does not see it.
    blind = remap.prototypes.matrix[:, 0] - remap.prototypes.matrix[:, f]
    assert remap.apply(blind, 0).norm() < tolerance(remap)
    assert remap.apply(blind, 1).norm() > 0.1 * blind.norm()


# --- against dense matrices -----------------------------------------------------------------------------------------


@EXAMPLES
@given(remaps(conditions=(1.0, 1e2)))
def test_apply_equals_the_dense_experts(remap):
    E, z = dense_experts(remap), randn(5, len(remap.prototypes.matrix))
    # The normal equations of the reference square the condition number.
    tol = 1e-14 * condition(remap.prototypes, remap.solver) ** 2 * len(E[0])

    for expert in range(len(E)):
        close(remap.apply(z, expert), z @ E[expert].T, tol)
    close(remap.apply(z), z @ E.mean(0).T, tol)
    assert (remap.apply(z) - z).norm() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (5, 7, 12)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_apply_in_every_dtype_and_shape(dtype, shape, solver):
    remap = make_remap(solver=solver)
    E, z = dense_experts(remap), randn(*shape).to(dtype)
    kept = z.clone()
    per_sample = torch.tensor([2, 0, 1, 1, 0])
    cases = [(None, E.mean(0)), (0, E[0]), (2, E[2])] + ([(per_sample, E[per_sample])] if len(shape) > 1 else [])
    for expert, matrix in cases:
        actual, expected = remap.apply(z, expert), torch.einsum("...d,...od->...o", z.double(), expand(matrix, z))

        assert actual.dtype == dtype
        # The dtype's own rounding; float64 has that of the reference, whose condition number is below 100.
        torch.testing.assert_close(actual, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-10)
        assert (actual - z).double().norm() > 0.1 * z.double().norm()
    assert torch.equal(z, kept)


def expand(matrix, z):
    """`(batch, d, d)` against features `(batch, tokens, d)` needs an axis for the tokens."""
    return matrix[:, None] if matrix.ndim == 3 and z.ndim == 3 else matrix


def test_per_sample_experts_are_single_experts():
    remap, z, experts = make_remap(), randn(5, 7, 12), torch.tensor([2, 0, 1, 1, 0])
    moved = remap.apply(z, experts)

    for row, expert in enumerate(experts.tolist()):
        close(moved[row], remap.apply(z[row], expert), 1e-14)
    assert (moved - remap.apply(z, experts.flip(0))).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("expert", [None, 0, 2])
def test_merged_weight_is_the_dense_product_cast_once(dtype, expert):
    remap, weight = make_remap(), randn(9, 12).to(dtype)
    kept, E = weight.clone(), dense_experts(remap)
    merged = remap.merged(weight, expert)
    expected = weight.double() @ (E.mean(0) if expert is None else E[expert])

    assert merged.dtype == dtype
    torch.testing.assert_close(merged, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-12)
    # Half a unit in the last place, eps / 2, is what one cast costs (float64: the reference's own rounding).
    error = (merged.double() - expected).abs() / expected.abs()
    assert error.max() <= max(torch.finfo(dtype).eps / 2, 1e-10)
    assert torch.equal(weight, kept)
    assert (merged - weight).double().norm() > 0.1 * weight.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weight_reads_a_feature_as_the_expert_does(dtype):
    remap, weight, z = make_remap(), randn(9, 12).to(dtype), randn(4, 12)
    lora_A, lora_B = remap.delta(weight, 1)

    assert lora_A.dtype == lora_B.dtype == torch.float64
    assert lora_A.shape == (2, 12)
    assert lora_B.shape == (9, 2)
    close(z @ (weight.double() + lora_B @ lora_A).T, remap.apply(z, 1) @ weight.double().T, 1e-13)
    assert lora_B.abs().max() > 0.1


def test_lora_a_is_shared_by_layers_and_experts():
    remap = make_remap()
    narrow, wide = randn(9, 12, seed=1), randn(30, 12, seed=2)

    for expert in (None, 0, 1, 2):
        assert torch.equal(remap.delta(narrow, expert)[0], remap.D_F)
        assert torch.equal(remap.delta(wide, expert)[0], remap.D_F)
    assert not torch.equal(remap.delta(narrow, 0)[1], remap.delta(narrow, 1)[1])


# --- erasing without remapping --------------------------------------------------------------------------------------


def test_erase_alone_is_the_orthogonal_projection():
    prototypes = make_prototypes(12, 3)
    remap = Remap.fit(prototypes, prototypes.names, [[None, None, None]])
    basis, z = torch.linalg.qr(prototypes.matrix)[0], randn(5, 12)

    close(remap.apply(z), z - z @ basis @ basis.T, 1e-13)
    assert (remap.apply(z) - z).norm() > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_erase_takes_the_coordinate_out_and_nothing_else(solver):
    prototypes = make_prototypes(12, 5)
    remap = Remap.fit(prototypes, ["p1", "p3"], [[None, None]], solver=solver)
    P, z = prototypes.matrix, randn(5, 12)
    after = remap.apply(P.T).T

    close(after[:, [1, 3]], torch.zeros(12, 2, dtype=torch.float64), 1e-12)
    close(after[:, [0, 2, 4]], P[:, [0, 2, 4]], 1e-12)
    close(remap.apply(z), z - z @ remap.dual[[1, 3]].T @ P[:, [1, 3]].T, 1e-12)
    close(remap.apply(z), z @ dense_experts(remap)[0].T, 1e-11)
    assert P[:, [1, 3]].norm(dim=0).min() > 0.05


def test_erase_and_remap_can_be_mixed():
    prototypes = make_prototypes(12, 5)
    remap = Remap.fit(prototypes, ["p0", "p1"], [["p2", None], [None, "p3"]])
    P, zero = prototypes.matrix, torch.zeros(12, dtype=torch.float64)
    first, second = remap.apply(P.T, 0).T, remap.apply(P.T, 1).T

    assert remap.targets.tolist() == [[2, -1], [-1, 3]]
    close(first, torch.stack([P[:, 2], zero, *P[:, 2:].T], dim=1), 1e-12)
    close(second, torch.stack([zero, P[:, 3], *P[:, 2:].T], dim=1), 1e-12)
    assert (first - second).norm() > 0.1


# --- against others -------------------------------------------------------------------------------------------------


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
        return float((uce(weight, columns[:2], targets, columns[2:], strength) - merged).norm() / merged.norm())

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
        Remap.fit(fitter.prototypes, ["p0", "p1"], [["p2", "p3"]], solver=solver, shrinkage=0.0) for solver in SOLVERS
    )

    def moved(dual):
        return float((features @ dual[:2].T @ least.shift().T).square().sum(1).mean())

    def read(dual):
        return float((features @ dual[:2].T).square().sum(1).mean())

    for remap in (pinv, least):
        close(remap.apply(P.T[:2]), P.T[2:4], 1e-12)
    assert moved(least.dual) == pytest.approx(float((least.apply(features) - features).square().sum(1).mean()))
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
    rotated = dataclasses.replace(
        prototypes,
        matrix=rotation @ prototypes.matrix,
        second_moment=rotation @ prototypes.second_moment @ rotation.T,
    )
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


# --- verify ---------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(remaps())
def test_verify_measures_small_errors(remap):
    measured = remap.verify()

    measured.pop("ordinary_moved", None)
    assert set(measured) == {"forget_to_target", "remain_fixed", "idempotent", "nothing_left", "rank"}
    assert measured.pop("rank") == remap.rank
    # Errors are relative to shifts and remain prototypes, which may be shorter than P by its condition number.
    P = remap.prototypes.matrix
    smallest = min(float(remap.shifts.norm(dim=1).min()), float(P.norm(dim=0).min()))
    assert max(measured.values()) < tolerance(remap) * max(1.0, float(torch.linalg.matrix_norm(P, 2)) / smallest)


def test_verify_measures_how_far_ordinary_features_move():
    features = randn(500, 12)
    prototypes = Prototypes(randn(12, 4), tuple("abcd"), torch.ones(4), features.T @ features / 500)
    remap = Remap.fit(prototypes, ["a"], [["b"], ["c"]], solver="covariance")
    moved = [(remap.apply(features, expert) - features).square().sum() / features.square().sum() for expert in (0, 1)]
    assert remap.verify()["ordinary_moved"] == pytest.approx(float(max(moved).sqrt()))
    assert remap.verify()["ordinary_moved"] > 1e-3


def test_verify_sees_a_dual_that_was_tampered_with():
    remap = make_remap()
    scaled = dataclasses.replace(remap, dual=1.1 * remap.dual).verify()
    assert scaled["forget_to_target"] == pytest.approx(0.1)
    assert scaled["nothing_left"] == pytest.approx(0.1)
    assert scaled["idempotent"] > 0.05

    noisy = dataclasses.replace(remap, dual=remap.dual + 0.1 * randn(7, 12)).verify()
    assert min(noisy[key] for key in ("forget_to_target", "remain_fixed", "idempotent", "nothing_left")) > 1e-3


def test_verify_sees_prototypes_that_were_tampered_with():
    remap = make_remap()
    prototypes = dataclasses.replace(remap.prototypes, matrix=remap.prototypes.matrix + 0.1 * randn(12, 7))
    measured = dataclasses.replace(remap, prototypes=prototypes).verify()

    assert min(measured[key] for key in ("forget_to_target", "remain_fixed", "idempotent", "nothing_left")) > 1e-3


def test_verify_sees_a_lost_rank():
    remap = make_remap()
    same = remap.prototypes.matrix.clone()
    same[:, 1] = same[:, 0]
    targets = torch.full_like(remap.targets, 4)

    prototypes = dataclasses.replace(remap.prototypes, matrix=same)
    assert dataclasses.replace(remap, prototypes=prototypes, targets=targets).verify()["rank"] == 1


def test_verify_does_not_take_not_a_number_for_zero():
    remap = make_remap()
    measured = dataclasses.replace(remap, dual=torch.zeros_like(remap.dual)).verify()  # ‖D_F E‖ / ‖D_F‖ is 0 / 0

    assert measured["forget_to_target"] == 1
    assert not measured["nothing_left"] < 1e-6


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_forget_in_the_span_of_others_names_the_nearest(solver):
    prototypes = make_prototypes(12, 5)
    P = prototypes.matrix.clone()
    P[:, 1] = 3 * P[:, 3] - 0.5 * P[:, 2]
    cosine = float(torch.nn.functional.cosine_similarity(P[:, 1], P[:, 3], dim=0))

    with pytest.raises(PrototypeError, match=f"'p1' is a linear combination.*nearest: 'p3', cosine {cosine:.4f}"):
        Remap.fit(dataclasses.replace(prototypes, matrix=P), ["p1"], [["p0"]], solver=solver)
    Remap.fit(prototypes, ["p1"], [["p0"]], solver=solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_others_may_depend_on_each_other(solver):
    prototypes = make_prototypes(12, 5)
    P = prototypes.matrix.clone()
    P[:, 4] = 2 * P[:, 3] - P[:, 2]
    after = Remap.fit(dataclasses.replace(prototypes, matrix=P), ["p0"], [["p3"]], solver=solver).apply(P.T).T

    close(after, torch.cat([P[:, 3:4], P[:, 1:]], dim=1), 1e-11)
    assert (after - P).norm() > 0.1


def test_more_prototypes_than_dimensions():
    names = tuple(f"p{i}" for i in range(9))

    with pytest.raises(PrototypeError, match="9 prototypes do not fit into 8 dimensions"):
        Remap.fit(Prototypes(randn(8, 9), names, torch.ones(9)), ["p0"], [["p1"]])
    Remap.fit(Prototypes(randn(9, 9), names, torch.ones(9)), ["p0"], [["p1"]])


@pytest.mark.parametrize("targets", [[["p1", "p2"]], [["p2", "p3"], ["p2", "p0"]]])
def test_forget_and_targets_may_not_overlap(targets):
    with pytest.raises(PrototypeError, match="both forgotten and a target"):
        Remap.fit(make_prototypes(12, 5), ["p0", "p1"], targets)


def test_a_concept_forgotten_twice_is_refused():
    # It would be moved twice: E p_f = p_f + 2 (p_t − p_f).
    with pytest.raises(PrototypeError, match="'p0'"):
        Remap.fit(make_prototypes(12, 5), ["p0", "p0"], [["p2", "p2"]])


def test_unknown_solver_lists_the_known():
    with pytest.raises(PrototypeError, match="'ridge'.*pinv, covariance"):
        Remap.fit(make_prototypes(12, 5), ["p0"], [["p1"]], solver="ridge")


@pytest.mark.parametrize("name", ["forget", "target"])
def test_unknown_names_list_the_known(name):
    with pytest.raises(PrototypeError, match="'p9'.*'p0', 'p1'"):
        Remap.fit(make_prototypes(12, 5), ["p9" if name == "forget" else "p0"], [["p9" if name == "target" else "p1"]])


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_zero_and_not_finite_prototypes_are_named(value):
    prototypes = make_prototypes(12, 5)
    P = prototypes.matrix.clone()
    P[:, 2] = value

    with pytest.raises(PrototypeError, match="'p2' is zero or not finite"):
        Remap.fit(dataclasses.replace(prototypes, matrix=P), ["p0"], [["p1"]])


def test_covariance_needs_a_moment():
    prototypes = dataclasses.replace(make_prototypes(12, 5), second_moment=None)

    with pytest.raises(PrototypeError, match="update_moment"):
        Remap.fit(prototypes, ["p0"], [["p1"]], solver="covariance")
    Remap.fit(prototypes, ["p0"], [["p1"]], solver="pinv")


# --- draw_experts ---------------------------------------------------------------------------------------------------

LETTERS = list("abcdefgh")


def test_targets_are_drawn_without_replacement_and_then_again():
    drawn = [expert[0] for expert in draw_experts([LETTERS[:5]], 12, max_distinct=5)]

    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == LETTERS[:5]
    assert drawn[10:] == drawn[:2]


def test_a_draw_is_a_function_of_the_seed():
    options = [LETTERS, LETTERS]

    assert draw_experts(options, 6, max_distinct=8, seed=3) == draw_experts(options, 6, max_distinct=8, seed=3)
    assert draw_experts(options, 6, max_distinct=8, seed=3) != draw_experts(options, 6, max_distinct=8, seed=4)


def test_a_draw_leaves_options_and_random_state_alone():
    options, state = [list(LETTERS), (None,)], torch.get_rng_state()
    drawn = draw_experts(options, 3, max_distinct=8)

    assert options == [LETTERS, (None,)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(expert) for expert in drawn] == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "num_experts"),
    [([list("ab"), list("cde")], 6), ([list("ab"), list("cdef")], 4), ([[None], list("abc")], 3), ([["a"], ["b"]], 1)],
)
def test_by_default_every_option_is_used_equally_often(options, num_experts):
    drawn = draw_experts(options, None, max_distinct=8)

    assert len(drawn) == num_experts
    for column, names in enumerate(options):
        used = [expert[column] for expert in drawn]
        assert {used.count(name) for name in names} == {num_experts // len(names)}
        assert set(used) == set(names)


@pytest.mark.parametrize("num_experts", [None, 1, 7])
@pytest.mark.parametrize("max_distinct", [3, 4, 6, 20])
@pytest.mark.parametrize("options", [[LETTERS] * 3, [list("abc"), list("def"), list("gh")]])
def test_max_distinct_is_kept_and_every_concept_has_a_target(options, max_distinct, num_experts):
    for seed in range(5):
        drawn = draw_experts(options, num_experts, max_distinct=max_distinct, seed=seed)
        targets = [target for expert in drawn for target in expert]

        assert len(set(targets)) <= max_distinct
        for expert in drawn:
            assert all(target in names for target, names in zip(expert, options, strict=True))
        if num_experts is None:  # and the room is used
            assert len(set(targets)) == min(max_distinct, 8)


def test_erasing_takes_no_room():
    assert draw_experts([[None], [None]], None, max_distinct=0) == [[None, None]]
    assert draw_experts([[None], ["a"]], 2, max_distinct=1) == [[None, "a"], [None, "a"]]


def test_no_room_is_an_error():
    options = [["a"], ["b"], ["c"]]

    with pytest.raises(PrototypeError, match="3 concepts.*room for 2"):
        draw_experts(options, None, max_distinct=2)
    assert draw_experts(options, None, max_distinct=3) == [["a", "b", "c"]]
