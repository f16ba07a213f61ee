"""The configuration of a benchmark of attacks, its cells, and the results in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..bootstrap import draw_accuracies, draw_means, interval
from ..run import BenchmarkConfig, Cell, short_hash


KEYS = ("attack", "model", "method", "forget", "seed")  # of a cell, in its rows


@dataclass(frozen=True)
class AttackConfig(BenchmarkConfig):
    """The configuration of a folder of attacks.

    Attributes:
        evaluation (`Mapping[str, Any]`): data, sizes and whatever else the victims are made with.
        references (`list[str]`): the methods that give the others' numbers a meaning.
        models (`Mapping[str, Any]`): name to what determines the model.
        attacks (`Mapping[str, Mapping[str, Any]]`): attack to its settings.
        seeds (`int`): the number of runs of each method.
        benchmark, more_hf, methods, forget, runs: as of `BenchmarkConfig`.
    """

    FIXED: ClassVar = ("evaluation", "references")
    JOINED: ClassVar = ("models", "methods", "forget", "attacks")

    benchmark: str
    more_hf: str
    evaluation: Mapping[str, Any]
    references: list[str]
    models: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    forget: Mapping[str, Any]
    attacks: Mapping[str, Mapping[str, Any]]
    seeds: int
    runs: list[dict[str, Any]]

    def cells(self, output: Path) -> list[Cell]:
        """All cells, done or not; those of one victim follow each other."""
        facts, cells = self.to_dict(), []
        for model, definition in facts["models"].items():
            for seed in range(self.seeds):
                for forget, classes in facts["forget"].items():
                    for method, settings in facts["methods"].items():
                        for attack, budget in facts["attacks"].items():
                            fixed = [facts["evaluation"], definition, classes, method, settings, seed]
                            name = short_hash([*fixed, attack, budget])
                            path = output / "cells" / f"{name}.json"
                            cells.append(Cell(method, forget, path, seed, model, attack))
        return cells

    def collect(self, output: Path) -> list[dict[str, Any]]:
        """The rows of `rows.csv`: the results of each cell that is done."""
        rows = []
        for cell in self.cells(output):
            if cell.is_done:
                key = {name: getattr(cell, name) for name in KEYS}
                rows += [{**key, **result} for result in cell.read()]
        return rows


RECOGNISED = "recognised"
"""The measure of most attacks: the percent of the forgotten test samples or pictures that are recognised as
what was forgotten."""

AUC = "auc"
"""The probability in percent that a forgotten test sample scores above one of the others: 50 is chance.
Unlike `RECOGNISED` it depends on no prior: a class that shares its place with nine others loses every vote,
and can still be told apart."""

LPIPS = "lpips"
"""How far pictures moved from the original's."""


@dataclass(frozen=True)
class Result:
    """One number that an attack found in one model: with the keys of its cell, a row of `rows.csv`.

    The same number of the references (the original first of all) gives it a meaning.
    """

    recovered: float | None  # the number; `None` if the attack did not get there
    measure: str = RECOGNISED  # what `recovered` is, `RECOGNISED` or another name
    variant: str = ""  # which of the attack's forms: `"k-NN"`
    budget: float = 0  # what the attacker spent: 64
    unit: str = ""  # of what: `"queries"`
    n: int = 0  # `recovered` is the percent of this many; 0 for a number that is no such percentage
    # low, high: the ends of the 95 % interval
    low: float | None = None
    high: float | None = None

    @classmethod
    def of_hits(cls, hits: float, n: int, **facts: Any) -> Result:
        """The percent that `hits` are of `n`, with its binomial interval; `facts` are the other fields."""
        percent = 100 * hits / n
        low, high = interval(draw_accuracies({"": ([n], [percent])})[0][""].mean(1))
        return cls(percent, n=n, low=low, high=high, **facts)


def mean_of(recovered: list[float], n: list[int]) -> tuple[float, float | None, float | None]:
    """The mean of several runs' numbers and the ends of its 95 % interval.

    Runs are drawn with replacement, and where each is the percent of `n` samples, the hits from a binomial. A
    single number that is no such percentage has no interval.
    """
    mean = float(np.mean(recovered))
    if all(n):
        return (mean, *interval(draw_accuracies({"": (n, recovered)})[0][""].mean(1)))
    return (mean, *interval(draw_means(recovered))) if len(recovered) > 1 else (mean, None, None)
