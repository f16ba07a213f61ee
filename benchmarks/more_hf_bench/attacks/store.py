"""The folder of a benchmark of attacks: its configuration, and one file for each finished cell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from more_hf.core.files import write_json

from ..columns import rounded
from ..run import BenchmarkConfig, short_hash
from .result import Result


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

    def joined_with(self, folder: str | Path) -> Self:
        joined = super().joined_with(folder)
        return replace(joined, seeds=max(joined.seeds, self.seeds))

    def cells(self, output: Path) -> list[Cell]:
        """All cells, done or not; those of one victim follow each other."""
        facts, cells = self.to_dict(), []
        for model, definition in facts["models"].items():
            for seed in range(self.seeds):
                for forget, classes in facts["forget"].items():
                    for method, settings in facts["methods"].items():
                        case = Case(model, method, forget, seed)
                        for attack, budget in facts["attacks"].items():
                            fixed = [facts["evaluation"], definition, classes, method, settings, seed]
                            name = short_hash([*fixed, attack, budget])
                            cells.append(Cell(case, attack, output / "cells" / f"{name}.json"))
        return cells


@dataclass(frozen=True)
class Case:
    """The names of one erased model, a victim: which model, by which method, without what, in which run."""

    model: str
    method: str
    forget: str
    seed: int


@dataclass(frozen=True)
class Cell:
    """One attack in one case. It is done when its file exists."""

    case: Case
    attack: str
    path: Path

    @property
    def is_done(self) -> bool:
        return self.path.is_file()

    def write(self, found: list[Result]) -> None:
        write_json(self.path, [rounded(asdict(result)) for result in found])

    def read(self) -> list[dict[str, Any]]:
        """The rows of its results."""
        found = json.loads(self.path.read_text("utf-8"))
        return [{"attack": self.attack, **asdict(self.case), **result} for result in found]
