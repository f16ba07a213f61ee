import itertools
import random
import statistics

import numpy as np
import pandas as pd
import pytest

from more_hf_bench.bootstrap import ClusterBootstrap, draw_accuracies, draw_counts, draw_means


def clusters(names, stratum="A"):
    return pd.DataFrame({"stratum": stratum, "name": names})


def test_a_mean_and_a_paired_difference():
    draws = ClusterBootstrap(clusters(range(50)), draws=2000)
    low = pd.Series(range(50), dtype=float)
    difference = draws.mean(low + 1) - draws.mean(low)
    assert difference.value == 1
    assert difference.interval == pytest.approx((1, 1))  # the spread over clusters cancels
    assert np.diff(draws.mean(low).interval) > 5


def test_a_share_of_another_mean_is_paired():
    draws = ClusterBootstrap(clusters(range(50)), draws=2000)
    odd = pd.Series(range(50), dtype=float) % 2
    whole, part = draws.mean(odd), draws.mean(0.25 * odd)
    assert part.percent_of(whole).value == 25
    assert part.percent_of(whole).interval == pytest.approx((25, 25))
    rare = ClusterBootstrap(clusters([0, 1]), draws=100).mean(pd.Series([1.0, 0.0]))
    assert np.isnan(rare.percent_of(rare).drawn).any()  # draws of cluster 1 alone
    assert rare.percent_of(rare).interval == (100, 100)


def test_nothing_measured():
    draws = ClusterBootstrap(clusters([0, 1]), draws=100)
    nothing = draws.mean(pd.Series([np.nan, np.nan]))
    assert np.isnan([nothing.value, *nothing.interval]).all()
    some = draws.mean(pd.Series([2.0, np.nan]))
    assert np.isnan(some.drawn).any()  # draws of cluster 1 alone
    assert some.interval == (2.0, 2.0)


def test_draws_are_those_of_the_written_out_loops():
    generator = np.random.default_rng(0)
    apart = [generator.multinomial(n, [1 / n] * n, size=30) for n in (3, 5)]
    np.testing.assert_array_equal(
        draw_counts([3, 5], 30, np.random.default_rng(0)), np.concatenate(apart, axis=1)
    )

    values = [0.0, 1.0, 5.0]
    picks = np.random.default_rng(0).integers(3, size=(40, 3))
    np.testing.assert_array_equal(
        draw_means(values, draws=40), [np.mean([values[i] for i in pick]) for pick in picks]
    )

    measured = {"acc_f": ([10, 1000], [0.0, 50.0]), "acc_r": ([7, 7], [100.0, 100.0])}
    drawn, picks = draw_accuracies(measured, draws=60)
    np.testing.assert_array_equal(picks, np.random.default_rng(0).integers(2, size=(60, 2)))
    assert (drawn["acc_r"] == 100).all()
    assert (drawn["acc_f"][picks == 0] == 0).all()
    assert drawn["acc_f"][picks == 1].mean() == pytest.approx(50, abs=1)


def quantiles(values, names=None, stratum="A", **options):
    """Mean and interval of values, by default each in a cluster of its own."""
    names = range(len(values)) if names is None else names
    estimate = ClusterBootstrap(clusters(names, stratum), **options).mean(pd.Series(values))
    return estimate.value, *estimate.interval


def test_the_cluster_bootstrap_against_all_draws_by_hand():
    values = [0.0, 0.1, 0.5, 1.0]
    every = sorted(statistics.fmean(draw) for draw in itertools.product(values, repeat=4))
    mean, low, high = quantiles(values, draws=40_000)
    assert mean == pytest.approx(0.4)
    assert low == pytest.approx(np.quantile(every, 0.025), abs=0.026)
    assert high == pytest.approx(np.quantile(every, 0.975), abs=0.026)
    # and against the normal approximation, where there are many
    rng = random.Random(0)
    many = [rng.gauss(0.3, 0.1) for _ in range(300)]
    mean, low, high = quantiles(many)
    half = 1.96 * statistics.pstdev(many) / 300**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert quantiles(many) == (mean, low, high)


def test_measurements_of_one_cluster_are_drawn_together():
    assert quantiles([0.0] * 50 + [1.0] * 50, [0] * 50 + [1] * 50) == (0.5, 0.0, 1.0)
    assert quantiles([0.0, 1.0], stratum=["A", "B"]) == (0.5, 0.5, 0.5)  # each stratum keeps its one cluster
