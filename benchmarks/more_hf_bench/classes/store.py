"""The folder of a benchmark of classes or samples: its configuration, and one file for each finished cell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from more_hf.core.files import write_json

from ..run import BenchmarkConfig, short_hash
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
class KDCell:
    """One method that forgets one entry in one classifier. It is done when its file exists."""

    method: str
    forget: str
    seed: int
    path: Path

    @property
    def is_done(self) -> bool:
        return self.path.is_file()

    def write(self, measured: object) -> None:
        write_json(self.path, measured)

    def read(self) -> Any:
        return json.loads(self.path.read_text("utf-8"))


class KDConfig(BenchmarkConfig):
    """Base of the two configurations below.

    Attributes:
        training (`Training`): the classifiers.
        evaluation (`Mapping[str, Any]`): how each is measured.
        seeds (`int`): the number of trainings, and of runs of each method.
        forget (`Mapping[str, list[str]]`): entry to the names of its classes.
    """

    FIXED: ClassVar = ("training", "evaluation")

    training: Training
    evaluation: Mapping[str, Any]
    seeds: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KDConfig:
        training = data["training"]
        recipe = Recipe(**training["recipe"])
        return cls(**{**data, "training": Training(**{**training, "recipe": recipe})})

    def joined_with(self, folder: str | Path) -> KDConfig:
        joined = super().joined_with(folder)
        return replace(joined, seeds=max(joined.seeds, self.seeds))

    def cells(self, output: Path) -> list[KDCell]:
        """All cells, done or not: by seed, then entry of `forget`, then method.

        The name of a cell's file is a hash of everything that determines its content.
        """
        facts = self.to_dict()
        with_retrain = "retrain" in self.methods
        cells = []
        for seed in range(self.seeds):
            for forget, classes in facts["forget"].items():
                for method, settings in facts["methods"].items():
                    fixed = [facts["training"], facts["evaluation"]]
                    name = short_hash([*fixed, method, settings, classes, seed, with_retrain])
                    cells.append(KDCell(method, forget, seed, output / "cells" / f"{name}.json"))
        return cells


@dataclass(frozen=True)
class ClassesConfig(KDConfig):
    """The configuration of a benchmark that forgets classes. `evaluation` has `probe_seeds` and `passes`."""

    benchmark: str
    more_hf: str
    training: Training
    evaluation: Mapping[str, Any]
    class_names: list[str]
    seeds: int
    methods: Mapping[str, Mapping[str, Any]]
    forget: Mapping[str, list[str]]
    runs: list[dict[str, Any]]


@dataclass(frozen=True)
class SamplesConfig(KDConfig):
    """The configuration of a benchmark that forgets random samples. `evaluation` has `fraction`."""

    benchmark: str
    more_hf: str
    training: Training
    evaluation: Mapping[str, Any]
    seeds: int
    methods: Mapping[str, Mapping[str, Any]]
    forget: Mapping[str, list[str]]
    runs: list[dict[str, Any]]
