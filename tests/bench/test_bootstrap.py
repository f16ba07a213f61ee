import numpy as np
import pytest

from more_hf.bench.bootstrap import ClusterBootstrap, draw_accuracies, draw_counts, draw_means, interval


def test_a_mean_and_a_paired_difference():
    clusters = [("A", i) for i in range(50)]
    draws = ClusterBootstrap(clusters, draws=2000)
    low = draws.mean((cluster, float(i)) for i, cluster in enumerate(clusters))
    high = draws.mean((cluster, float(i) + 1) for i, cluster in enumerate(clusters))
    assert (high - low).value == 1
    assert (high - low).interval == pytest.approx((1, 1))  # the spread over clusters cancels
    assert np.diff(low.interval) > 5


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
