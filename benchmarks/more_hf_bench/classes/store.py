"""The configuration of a benchmark of classes or samples, and its cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..run import BenchmarkConfig, Cell, short_hash
from .training import Recipe


CLASSES, SAMPLES = "kd", "kd-samples"  # the benchmarks


@dataclass(frozen=True)
class Training:
    """The training of a benchmark's classifiers, a section of its configuration."""

    dataset: str
    model: str
    images: int
    image_size: int
    recipe: Recipe


@dataclass(frozen=True)
class ClassesConfig(BenchmarkConfig):
    """The configuration of a benchmark that forgets classes or random samples.

    Attributes:
        benchmark (`str`): `"kd"` for classes, `"kd-samples"`.
        training (`Training`): the classifiers.
        evaluation (`Mapping[str, Any]`): how each is measured: `probe_seeds` and `passes`; of samples the
            `fraction` that is forgotten.
        seeds (`int`): the number of trainings, and of runs of each method.
        forget (`Mapping[str, list[str]]`): entry to the names of its classes; of samples, their fraction.
        class_names (`list[str]`): of all classes; empty where samples are forgotten.
        more_hf, methods, runs: as of `BenchmarkConfig`.
    """

    FIXED: ClassVar = ("training", "evaluation")

    benchmark: str
    more_hf: str
    training: Training
    evaluation: Mapping[str, Any]
    seeds: int
    methods: Mapping[str, Mapping[str, Any]]
    forget: Mapping[str, list[str]]
    runs: list[dict[str, Any]]
    class_names: list[str] | tuple[str, ...] = ()

    @property
    def forgets_samples(self) -> bool:
        return self.benchmark == SAMPLES

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClassesConfig:
        training = data["training"]
        recipe = Recipe(**training["recipe"])
        return cls(**{**data, "training": Training(**{**training, "recipe": recipe})})

    def cells(self, output: Path) -> list[Cell]:
        """All cells, done or not: by seed, then entry of `forget`, then method."""
        facts = self.to_dict()
        with_retrain = "retrain" in self.methods
        cells = []
        for seed in range(self.seeds):
            for forget, classes in facts["forget"].items():
                for method, settings in facts["methods"].items():
                    fixed = [facts["training"], facts["evaluation"]]
                    name = short_hash([*fixed, method, settings, classes, seed, with_retrain])
                    cells.append(Cell(method, forget, output / "cells" / f"{name}.json", seed))
        return cells

    def done(self, output: Path) -> list[Cell]:
        """The cells that are done: by entry of `forget`, then method, then seed."""
        entries, methods = list(self.forget), list(self.methods)
        done = [cell for cell in self.cells(output) if cell.is_done]
        return sorted(done, key=lambda c: (entries.index(c.forget), methods.index(c.method), c.seed))

    def collect(self, output: Path) -> dict[str, list[dict[str, Any]]]:
        """The rows of `rows.csv`, and those of `probes.csv` unless samples are forgotten."""
        measured = [cell.read() for cell in self.done(output)]
        names = ["rows"] if self.forgets_samples else ["rows", "probes"]
        return {name: [row for cell in measured for row in cell[name]] for name in names}
