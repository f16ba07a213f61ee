"""The judge against scikit-learn's regression and scipy's intervals, and what it says it cannot tell."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from more_hf.core.errors import MoreError
from more_hf.tuning.judge import CHANCE, FOLDS, PENALTY, Estimate, Judge, chance_of_moves, features_of


COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 210)}


def pictures(color, n=8, seed=0, noise=60):
    """Noise around a color."""
    generator = torch.Generator().manual_seed(seed)
    around = torch.randint(-noise, noise, (n, 3, 64, 64), generator=generator)
    return (torch.tensor(color).view(3, 1, 1) + around).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def drawn():
    return {name: pictures(color, seed=i) for i, (name, color) in enumerate(COLORS.items())}


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (1, 200)])
def test_wilson(hits, n):
    estimate, expected = Estimate.share(hits, n), binomtest(hits, n).proportion_ci(method="wilson")
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert (estimate.value, estimate.n) == (hits / n, n)


def test_the_mean_and_its_interval():
    estimate = Estimate.mean(torch.tensor([1.0, 2.0, 4.0, 5.0]))
    half = 1.96 * np.std([1, 2, 4, 5], ddof=1) / 2
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-4)


def test_it_is_the_regression_of_scikit_learn(drawn):
    judge = Judge.fit(drawn)
    z = torch.stack([features_of(own) for own in drawn.values()]).numpy()
    z = (z - z.mean(0))[:, [1, 2, 3, 5, 6, 7]]  # less what the names of a case have in common
    z = z.reshape(-1, z.shape[-1])
    scaled = (z - z.mean(0)) / np.maximum(z.std(0, ddof=1), 1e-9)
    labels = np.repeat(range(3), 6)
    theirs = LogisticRegression(C=1 / (2 * PENALTY * len(z)), tol=1e-10, max_iter=5000).fit(scaled, labels)
    scores = z @ judge.weight[0].numpy().T + judge.bias[0].numpy()
    expected = theirs.decision_function(scaled)
    # adding the same to all scores changes nothing
    scores, expected = (own - own.mean(1, keepdims=True) for own in (scores, expected))
    np.testing.assert_allclose(scores, expected, rtol=0.05, atol=0.05)
    assert np.abs(expected).max() > 1  # and it is sure of something


def test_recognized_is_the_share_of_a_name(drawn):
    judge = Judge.fit(drawn)
    mixed = torch.cat([pictures(COLORS["red"], 6, seed=9), pictures(COLORS["blue"], 2, seed=10)])
    assert judge.taken_for(features_of(mixed)) == ["red"] * 6 + ["blue"] * 2
    assert judge.recognized(mixed, "red", cases=[7, 6, 5, 4, 3, 2, 1, 0]).n == 8
    assert judge.recognized(mixed, "red") == Estimate.share(6, 8)
    assert judge.recognized(mixed, "green").value == 0
    assert judge.can_tell("red")
    assert judge.found("red") == Estimate.share(8, 8)


def test_a_name_that_draws_what_another_draws(drawn):
    """It is told from the rest, and every picture of it is as often taken for the other's."""
    alike = {**drawn, "azure": drawn["blue"].roll(1, 0)}
    judge = Judge.fit(alike)
    assert judge.chance("red") < judge.chance("azure")
    # every held-out picture is in the confusion once, in the row of its name
    assert judge.confusion.sum(1).tolist() == [8] * 4
    own, other = judge.names.index("azure"), judge.names.index("blue")
    column = judge.confusion[:, own].tolist()
    assert column[own] + int(judge.confusion[own, other]) == 8
    assert judge.mistaken("azure") == Estimate.share(sum(column) - column[own], 24)


def test_chance_is_that_of_every_order(drawn):
    """By hand: of 3 names in 2 cases, every pair of places is one in nine."""
    judge = Judge.fit(drawn)
    unseen = torch.zeros(3, 2, 3, dtype=torch.float64)
    for places, at_least in {(0, 0): 9, (1, 0): 8, (1, 1): 6, (2, 1): 3, (2, 2): 1}.items():
        # red's own picture is ahead of so many others in each case
        unseen[0, :, 0] = torch.tensor(places)
        unseen[1, :, 0], unseen[2, :, 0] = 0.5, 1.5
        assert replace(judge, unseen=unseen).chance("red") == pytest.approx(at_least / 9)


@pytest.mark.slow
def test_names_that_draw_the_same_are_told_as_often_as_chance_has_it():
    told = []
    for seed in range(10):
        grey = {name: pictures((120, 120, 120), seed=10 * seed + i) for i, name in enumerate("abcd")}
        told += [Judge.fit(grey).can_tell(name) for name in grey]
    assert sum(told) <= 4  # of 40, by chance one


@pytest.mark.parametrize("step", [0.0, 6.0])
def test_the_chance_of_moves(step):
    """With a direction in common it is small; with none, its rank among the signs is anything."""
    generator = torch.Generator().manual_seed(0)
    chances = []
    for _ in range(20):
        before, after = torch.randn(2, 16, 30, generator=generator, dtype=torch.float64)
        after[:, 0] += step
        chances.append(chance_of_moves(before, after))
    if step:
        assert max(chances) < CHANCE
    else:
        assert 0.3 < sum(chances) / 20 < 0.7
        assert min(chances) > 0.001
    assert chance_of_moves(before, before) == 1


def test_what_the_names_of_a_case_share_says_nothing(drawn):
    """A bright and a dark half of the cases, by as much as the names differ: all are still told."""
    light = torch.tensor([0, 100] * 4).view(8, 1, 1, 1)
    lit = {name: (own // 2 + light).to(torch.uint8) for name, own in drawn.items()}
    judge = Judge.fit(lit)
    assert judge.accuracy.value == 1
    dark = lit["green"][:2].flip(0)  # in the other's case, each is off by the difference
    assert judge.taken_for(features_of(dark), [1, 0]) == ["green"] * 2


def test_a_picture_that_it_was_fitted_on_is_not_known_again():
    """Else an edit that gives the target's very picture would never be taken for the concept."""
    alike = {"here": pictures((120, 120, 120), 16, seed=1), "there": pictures((120, 120, 120), 16, seed=2)}
    judge = Judge.fit(alike)
    assert judge.recognized(alike["there"], "there") == judge.found("there")
    assert judge.accuracy.value < 0.8


def test_what_it_needs(drawn):
    with pytest.raises(MoreError, match="at least two names"):
        Judge.fit({"red": drawn["red"]})
    with pytest.raises(MoreError, match="3 of 'red'"):
        Judge.fit({name: own[: FOLDS - 1] for name, own in drawn.items()})
    with pytest.raises(MoreError, match="5 of 'blue'"):
        Judge.fit({**drawn, "blue": drawn["blue"][:5]})
