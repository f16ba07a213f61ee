"""Bootstrap intervals. All draws are seeded, so the same rows give the same interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd


LEVEL = (0.025, 0.975)  # the ends of a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A statistic of the sample, and the same statistic of every bootstrap draw `(draws,)`."""

    value: float
    drawn: np.ndarray

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, paired: both must come from the same draws."""
        return Estimate(self.value - other.value, self.drawn - other.drawn)

    def percent_of(self, whole: Estimate) -> Estimate:
        """Its percentage of another statistic of the same draws; NaN wherever that is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = np.where(whole.drawn == 0, np.nan, 100 * self.drawn / whole.drawn)
        return Estimate(100 * self.value / whole.value if whole.value else np.nan, drawn)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The ends of the 95 % interval."""
        return interval(self.drawn)


class ClusterBootstrap:
    """
    Draws of clusters with replacement, within each stratum. Every mean of one object is taken on the same
    draws, so that differences between two means are paired.

    A cluster is drawn with all its measurements, because several images of one prompt are not independent.
    The two columns of `clusters` are the stratum and the name of each measurement's cluster.
    """

    def __init__(self, clusters: pd.DataFrame, *, draws: int = 10_000, seed: int = 0):
        stratum, name = clusters.columns
        self.cluster = clusters.groupby([stratum, name]).ngroup()
        sizes = clusters.drop_duplicates().groupby(stratum).size()
        self.times_drawn = _seeded_counts(tuple(sizes), draws, seed)
        self.means: dict[bytes, Estimate] = {}

    def mean(self, values: pd.Series) -> Estimate:
        """Return the mean of some of the measurements, NaN left out; NaN if there is nothing to average."""
        values = values.dropna()
        cluster, clusters = self.cluster[values.index], self.times_drawn.shape[1]
        total = np.bincount(cluster, values, clusters)
        count = np.bincount(cluster, minlength=clusters).astype(float)
        # Small pictures have the same distance at all sizes: what was drawn once is not drawn again.
        key = total.tobytes() + count.tobytes()
        if key not in self.means:
            drawn_count = self.times_drawn @ count
            # A draw may miss all clusters with a value.
            with np.errstate(invalid="ignore"):
                drawn = np.where(drawn_count > 0, self.times_drawn @ total / drawn_count, np.nan)
                self.means[key] = Estimate(total.sum() / count.sum(), drawn)
        return self.means[key]


@lru_cache(maxsize=4)
def _seeded_counts(sizes: tuple[int, ...], draws: int, seed: int) -> np.ndarray:
    """`draw_counts` from a seed: a summary's lines have strata of the same few sizes."""
    return draw_counts(sizes, draws, np.random.default_rng(seed))


def draw_counts(sizes: Iterable[int], draws: int, generator: np.random.Generator) -> np.ndarray:
    """
    Draw with replacement within strata of these sizes: how often each member is drawn, float64 `(draws,
    members)`.
    """
    counts = [generator.multinomial(size, np.full(size, 1 / size), size=draws) for size in sizes]
    return np.concatenate(counts, axis=1).astype(float)


def draw_means(values: Sequence[float], *, draws: int = 2000) -> np.ndarray:
    """Draw values with replacement: the mean of each draw, `(draws,)`."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return np.asarray(values, dtype=float)[picks].mean(1)


def draw_accuracies(
    measured: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, draws: int = 5000
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    Draw runs with replacement, and in each run as many hits as a binomial gives.

    `measured` has for each column the number of samples and the accuracy in percent of each run; all columns
    have the same runs. Returns accuracies in percent by column, `(draws, runs)`, and the runs that were
    drawn, the same in all columns.
    """
    generator = np.random.default_rng(0)
    runs = len(next(iter(measured.values()))[0])
    picks = generator.integers(runs, size=(draws, runs))
    drawn = {}
    for column, (samples, percent) in measured.items():
        n, chance = np.asarray(samples)[picks], np.asarray(percent, dtype=float)[picks] / 100
        drawn[column] = 100 * generator.binomial(n, np.clip(chance, 0, 1)) / n
    return drawn, picks


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % interval of draws `(draws,)`; draws that are NaN are left out."""
    if np.isnan(drawn).all():
        return np.nan, np.nan
    low, high = np.nanquantile(drawn, LEVEL)
    return float(low), float(high)
