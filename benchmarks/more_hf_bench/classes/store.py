"""The configuration of a benchmark of classes or samples, and its cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..run import BenchmarkConfig, Cell, short_hash
from .training import Recipe


@dataclass(frozen=True)
class Training:
    """The training of a benchmark's classifiers, a section of its configuration."""

    dataset: str
    model: str
    images: int
    image_size: int
    recipe: Recipe


@dataclass(frozen=True)
class SamplesConfig(BenchmarkConfig):
    """The configuration of a benchmark that forgets random samples.

    Attributes:
        training (`Training`): the classifiers.
        evaluation (`Mapping[str, Any]`): how each is measured; here the `fraction` that is forgotten.
        seeds (`int`): the number of trainings, and of runs of each method.
        forget (`Mapping[str, list[str]]`): entry to the names of its classes.
        benchmark, more_hf, methods, runs: as of `BenchmarkConfig`.
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SamplesConfig:
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


@dataclass(frozen=True)
class ClassesConfig(SamplesConfig):
    """The configuration of a benchmark that forgets classes. `evaluation` has `probe_seeds` and `passes`."""

    class_names: list[str]
