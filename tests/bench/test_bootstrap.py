import itertools
import random
import statistics

import numpy as np
import pytest

from more_hf_bench.bootstrap import ClusterBootstrap, draw_accuracies, draw_counts, draw_means, interval


def test_a_mean_and_a_paired_difference():
    clusters = [("A", i) for i in range(50)]
    draws = ClusterBootstrap(clusters, draws=2000)
    low = draws.mean((cluster, float(i)) for i, cluster in enumerate(clusters))
    high = draws.mean((cluster, float(i) + 1) for i, cluster in enumerate(clusters))
    assert (high - low).value == 1
    assert (high - low).interval == pytest.approx((1, 1))  # the spread over clusters cancels
    assert np.diff(low.interval) > 5


def test_a_share_of_another_mean_is_paired():
    clusters = [("A", i) for i in range(50)]
    draws = ClusterBootstrap(clusters, draws=2000)
    whole = draws.mean((cluster, float(i % 2)) for i, cluster in enumerate(clusters))
    part = draws.mean((cluster, 0.25 * (i % 2)) for i, cluster in enumerate(clusters))
    assert part.percent_of(whole).value == 25
    assert part.percent_of(whole).interval == pytest.approx((25, 25))
    few = ClusterBootstrap([("A", 0), ("A", 1)], draws=100)
    rare = few.mean([(("A", 0), 1.0), (("A", 1), 0.0)])
    assert np.isnan(rare.percent_of(rare).drawn).any()  # draws of cluster 1 alone
    assert rare.percent_of(rare).interval == (100, 100)


def test_nothing_measured():
    draws = ClusterBootstrap([("A", 0), ("A", 1)], draws=100)
    assert draws.mean([(("A", 0), None)]) is None
    some = draws.mean([(("A", 0), 2.0), (("A", 1), None)])
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

    drawn = draw_accuracies({"acc_f": ([10, 1000], [0.0, 50.0]), "acc_r": ([7, 7], [100.0, 100.0])}, draws=60)
    picks = np.random.default_rng(0).integers(2, size=(60, 2))
    assert (drawn["acc_r"] == 100).all()
    assert (drawn["acc_f"][picks == 0] == 0).all()
    assert drawn["acc_f"][picks == 1].mean() == pytest.approx(50, abs=1)


def test_the_interval_of_a_mean_is_that_of_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).normal(size=40)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    )
    assert interval(draw_means(values)) == pytest.approx(tuple(theirs.confidence_interval))


def quantiles(values, **options):
    """Mean and interval of (cluster, value) pairs."""
    estimate = ClusterBootstrap([cluster for cluster, _ in values], **options).mean(values)
    return estimate.value, *estimate.interval


def of_one_stratum(values):
    return [(("A", i), value) for i, value in enumerate(values)]


def test_the_cluster_bootstrap_against_all_draws_by_hand():
    values = [0.0, 0.1, 0.5, 1.0]
    every = sorted(statistics.fmean(draw) for draw in itertools.product(values, repeat=4))
    mean, low, high = quantiles(of_one_stratum(values), draws=40_000)
    assert mean == pytest.approx(0.4)
    assert low == pytest.approx(np.quantile(every, 0.025), abs=0.026)
    assert high == pytest.approx(np.quantile(every, 0.975), abs=0.026)
    # and against the normal approximation, where there are many
    rng = random.Random(0)
    many = of_one_stratum([rng.gauss(0.3, 0.1) for _ in range(300)])
    mean, low, high = quantiles(many)
    half = 1.96 * statistics.pstdev(value for _, value in many) / 300**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert quantiles(many) == (mean, low, high)


def test_measurements_of_one_cluster_are_drawn_together():
    assert quantiles([(("A", i), float(i)) for i in (0, 1) for _ in range(50)]) == (0.5, 0.0, 1.0)
    apart = [((stratum, i), float(i)) for i, stratum in enumerate("AB")]
    assert quantiles(apart) == (0.5, 0.5, 0.5)  # each stratum keeps its one cluster
