"""The configuration of a benchmark of attacks, and its cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
