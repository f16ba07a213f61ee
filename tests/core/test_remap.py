"""The guarantees G1 to G5 and G7, against references that share no code with the method."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.remaps import (
    EXAMPLES,
    SOLVERS,
    close,
    condition,
    dense_experts,
    make_prototypes,
    make_remap,
    randn,
    remaps,
    tolerance,
)

from more_hf.core.proof import probes
from more_hf.core.prototypes import PrototypeFitter, Prototypes
from more_hf.core.remap import Remap


pytestmark = pytest.mark.usefixtures("one_thread")  # small matrices: threads only wait for each other

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# The guarantees


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

    options = {"max_iter": 2000, "tolerance_grad": 1e-9, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS([weight], **options, line_search_fn="strong_wolfe")
    optimizer.step(loss)
    loss()
    assert weight.grad.abs().max() < 1e-8
    return weight.detach()[:, :-1], weight.detach()[:, -1]


def auc(positive, negative):
    """Chance that a positive scores higher, ties counted half, at a resolution of 1e-4."""
    difference = (positive[:, None] - negative).div(1e-4).round()
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def probe_f_against_t(counts, l2):
    """A probe before and after; of both w_f − w_t, and s_f − s_t on the features of f and of t."""
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    # classes overlap: a minimiser exists
    features = randn(len(labels), 6, seed=3) + 1.5 * randn(4, 6, seed=4)[labels]
    remap = Remap.fit(PrototypeFitter(6, [*"ftrs"]).update(features, labels).prototypes, ["f"], [["t"]])
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


# Against dense matrices


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
    cases = [(None, E.mean(0)), (0, E[0]), (2, E[2])]
    cases += [(per_sample, E[per_sample])] if len(shape) > 1 else []
    for expert, matrix in cases:
        actual = remap.apply(z, expert)
        expected = torch.einsum("...d,...od->...o", z.double(), expand(matrix, z))

        assert actual.dtype == dtype
        # The dtype's own rounding; float64 has that of the reference, whose condition number is below 100.
        torch.testing.assert_close(actual, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-10)
        assert (actual - z).double().norm() > 0.1 * z.double().norm()
    assert torch.equal(z, kept)


def expand(matrix, z):
    """`(batch, d, d)` against features `(batch, tokens, d)` needs an axis for the tokens."""
    return matrix[:, None] if matrix.ndim == 3 and z.ndim == 3 else matrix


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


# Erasing without remapping


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


def test_a_remap_that_holds_nothing_is_asked_finite_directions():
    """Erased without a target and without anything to keep, it has no other prototype to be asked."""
    remap = Remap.fit(Prototypes(torch.eye(3).double()[:, :1], ("a",), torch.ones(1)), ["a"], [[None]])
    rows = probes(remap)
    assert rows.shape == (1, 3)
    assert rows.isfinite().all()
