"""What `verify` sees, what `fit` refuses, and how targets are drawn."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from support.remaps import EXAMPLES, SOLVERS, close, make_prototypes, make_remap, randn, remaps, tolerance

from more_hf.core.errors import PrototypeError
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap, draw_experts


pytestmark = pytest.mark.usefixtures("one_thread")  # small matrices: threads only wait for each other

# Verify


@EXAMPLES
@given(remaps())
def test_verify_measures_small_errors(remap):
    measured = remap.verify()

    measured.pop("ordinary_moved", None)
    assert set(measured) == {"forget_to_target", "remain_fixed", "idempotent", "nothing_left", "rank"}
    assert measured.pop("rank") == remap.rank
    # Errors are relative to shifts and remain prototypes, which may be shorter than P by its condition
    # number.
    P = remap.prototypes.matrix
    smallest = min(float(remap.shifts.norm(dim=1).min()), float(P.norm(dim=0).min()))
    condition = float(torch.linalg.matrix_norm(P, 2)) / smallest
    assert max(measured.values()) < tolerance(remap) * max(1.0, condition)


def test_verify_measures_how_far_ordinary_features_move():
    features = randn(500, 12)
    prototypes = Prototypes(randn(12, 4), tuple("abcd"), torch.ones(4), features.T @ features / 500)
    remap = Remap.fit(prototypes, ["a"], [["b"], ["c"]], solver="covariance")
    changes = [(remap.apply(features, expert) - features).square().sum() for expert in (0, 1)]
    moved = [change / features.square().sum() for change in changes]
    assert remap.verify()["ordinary_moved"] == pytest.approx(float(max(moved).sqrt()))
    assert remap.verify()["ordinary_moved"] > 1e-3


ERRORS = ("forget_to_target", "remain_fixed", "idempotent", "nothing_left")


def test_verify_sees_what_was_tampered_with():
    remap = make_remap()
    scaled = dataclasses.replace(remap, dual=1.1 * remap.dual).verify()
    assert scaled["forget_to_target"] == pytest.approx(0.1)
    assert scaled["nothing_left"] == pytest.approx(0.1)
    assert scaled["idempotent"] > 0.05
    prototypes = dataclasses.replace(remap.prototypes, matrix=remap.prototypes.matrix + 0.1 * randn(12, 7))
    for change in ({"dual": remap.dual + 0.1 * randn(7, 12)}, {"prototypes": prototypes}):
        measured = dataclasses.replace(remap, **change).verify()
        assert min(measured[key] for key in ERRORS) > 1e-3


def test_verify_sees_a_lost_rank():
    remap = make_remap()
    same = remap.prototypes.matrix.clone()
    same[:, 1] = same[:, 0]
    targets = torch.full_like(remap.targets, 4)

    prototypes = dataclasses.replace(remap.prototypes, matrix=same)
    assert dataclasses.replace(remap, prototypes=prototypes, targets=targets).verify()["rank"] == 1


def test_verify_does_not_take_not_a_number_for_zero():
    remap = make_remap()
    # ‖D_F E‖ / ‖D_F‖ is 0 / 0
    measured = dataclasses.replace(remap, dual=torch.zeros_like(remap.dual)).verify()

    assert measured["forget_to_target"] == 1
    assert not measured["nothing_left"] < 1e-6


# Errors


@pytest.mark.parametrize("solver", SOLVERS)
def test_forget_in_the_span_of_others_names_the_nearest(solver):
    prototypes = make_prototypes(12, 5)
    P = prototypes.matrix.clone()
    P[:, 1] = 3 * P[:, 3] - 0.5 * P[:, 2]
    cosine = float(torch.nn.functional.cosine_similarity(P[:, 1], P[:, 3], dim=0))

    with pytest.raises(PrototypeError, match=f"'p1' is a linear.*nearest: 'p3', cosine {cosine:.4f}"):
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

    with pytest.raises(PrototypeError, match="8 dimensions"):
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
    with pytest.raises(PrototypeError, match="'ridge'"):
        Remap.fit(make_prototypes(12, 5), ["p0"], [["p1"]], solver="ridge")


@pytest.mark.parametrize(("forget", "target"), [("p9", "p1"), ("p0", "p9")])
def test_unknown_names_are_refused(forget, target):
    with pytest.raises(PrototypeError, match="'p9'"):
        Remap.fit(make_prototypes(12, 5), [forget], [[target]])


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_zero_and_not_finite_prototypes_are_named(value):
    prototypes = make_prototypes(12, 5)
    P = prototypes.matrix.clone()
    P[:, 2] = value

    with pytest.raises(PrototypeError, match="'p2'"):
        Remap.fit(dataclasses.replace(prototypes, matrix=P), ["p0"], [["p1"]])


def test_covariance_needs_a_moment():
    prototypes = dataclasses.replace(make_prototypes(12, 5), second_moment=None)

    with pytest.raises(PrototypeError, match="update_moment"):
        Remap.fit(prototypes, ["p0"], [["p1"]], solver="covariance")
    Remap.fit(prototypes, ["p0"], [["p1"]], solver="pinv")


# Draw_experts

LETTERS = list("abcdefgh")


def test_targets_are_drawn_without_replacement_and_then_again():
    drawn = [expert[0] for expert in draw_experts([LETTERS[:5]], 12, max_distinct=5)]

    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == LETTERS[:5]
    assert drawn[10:] == drawn[:2]


def test_a_draw_is_a_function_of_the_seed():
    drawn = [draw_experts([LETTERS, LETTERS], 6, max_distinct=8, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_draw_leaves_options_and_random_state_alone():
    options, state = [list(LETTERS), (None,)], torch.get_rng_state()
    drawn = draw_experts(options, 3, max_distinct=8)

    assert options == [LETTERS, (None,)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(expert) for expert in drawn] == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "num_experts"),
    [
        ([list("ab"), list("cde")], 6),
        ([list("ab"), list("cdef")], 4),
        ([[None], list("abc")], 3),
        ([["a"], ["b"]], 1),
    ],
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


def test_every_concept_has_a_target_even_without_room():
    """Whether an exact edit exists is for the solver to say, and a soft one always does."""
    assert draw_experts([["a"], ["b"], ["c"]], None, max_distinct=-3) == [["a", "b", "c"]]
    assert draw_experts([["a", "b"], ["b", "c"]], 2, max_distinct=0) == [["b", "b"]] * 2
