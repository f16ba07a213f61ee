"""How a benchmark of forgetting starts: the configuration of its folder, the methods' settings, and the classifiers, trained once each."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ... import __version__
from ...core.errors import IncompatibleBaseError
from ...core.files import write_text
from ..artists.store import BenchmarkError, read_config
from ..machine import processes, this_run
from ..splits import ImageSet, KDData
from .models import MODELS, build_classifier, load_pretrained
from .training import Recipe, train_classifier


logger = logging.getLogger(__name__)

RECIPES = {"digits": Recipe(epochs=30, batch_size=64, warmup_steps=20, shift=1), "emoji-100": Recipe(epochs=12)}
"""Training recipes of data sets that need another than the default."""

SAME_FOR_ALL = ("training", "evaluation")  # what one folder has only once


@dataclass(frozen=True)
class Trainer:
    """Where the classifiers of a benchmark come from: trained once each, in a folder of their own, and loaded from there."""

    name: str
    data: KDData
    recipe: Recipe
    folder: Path

    def original(self, seed: int) -> nn.Module:
        return self._train(self.data.train, seed, f"seed{seed}")

    def retrained(self, images: ImageSet, forget: str, seed: int) -> nn.Module:
        return self._train(images, seed, without(forget, seed))

    def seconds(self, forget: str, seed: int) -> float:
        """How long a retraining took, from its log."""
        log = (self._folder(without(forget, seed)) / "log.csv").read_text("utf-8").splitlines()
        return float(log[-1].split(",")[log[0].split(",").index("seconds")])

    def _folder(self, what: str) -> Path:
        return self.folder / f"{Path(self.data.name).name}-{Path(self.name).name}-{what}"

    def _train(self, images: ImageSet, seed: int, what: str) -> nn.Module:
        start = build_classifier if self.name in MODELS else load_pretrained
        folder = self._folder(what)
        model = start(self.name, self.data, seed=seed)
        return train_classifier(model, images, replace(self.recipe, seed=seed), output=folder, desc=folder.name)


@contextmanager
def leaving_out_what_diverges(cell) -> Iterator[None]:
    """A baseline whose training diverges costs its own cell, with a warning; the same call tries it again."""
    try:
        yield
    except IncompatibleBaseError as error:
        logger.warning("%s without %s, seed %d, is left out. %s", cell.method, cell.forget, cell.seed, error)


def without(forget: str, seed: int) -> str:
    """The end of a retraining's folder name; a hash where a hundred classes would make it too long for a file system."""
    name = forget.replace("/", "_")
    return f"without-{name if len(name) <= 100 else hashlib.sha256(forget.encode()).hexdigest()[:16]}-seed{seed}"


def start_run(
    benchmark: str,
    data: KDData,
    model: str,
    functions: Mapping[str, Callable],
    forget: Mapping[str, list[str]],
    facts: Mapping[str, Any],
    *,
    output: Path,
    seeds: int,
    models: str | Path | None,
    epochs: int | None,
    settings: Mapping[str, Any],
    tuned: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], Trainer]:
    """What a benchmark of any kind starts with: its configuration, which it writes, joined with what `output` holds; the
    trainer. `facts` are further entries of the configuration. Raises `BenchmarkError` before anything is written."""
    state = processes()
    refuse_unused(settings, tuned, functions)
    recipe = replace(RECIPES.get(data.name, Recipe()), flip=data.flip)
    recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
    if not recipe.epochs and (model in MODELS or "retrain" in functions):
        what = f"{model} starts from random weights" if model in MODELS else "retrain trains a classifier"
        raise BenchmarkError(f"Nothing is trained in 0 epochs, and {what}. Name a trained classifier's folder, or leave retrain out.")
    config = {
        "benchmark": benchmark,
        "more_hf": __version__,
        "training": {
            "dataset": data.name,
            "model": model,
            "images": len(data.train),
            "image_size": data.image_size,
            "recipe": asdict(recipe),
        },
        **facts,
        "seeds": seeds,
        "methods": {name: method_settings(function, settings, tuned.get(name, {})) for name, function in functions.items()},
        "forget": dict(forget),
        "runs": [this_run(state)],
    }
    config = join_config(read_config(output), config, output)
    state.wait_for_everyone()
    if state.is_main_process:
        write_text(output / "config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    return config, Trainer(model, data, recipe, Path(models or output / "models"))


def join_config(old: dict[str, Any] | None, new: dict[str, Any], output: Path) -> dict[str, Any]:
    """The folder's configuration with the methods, classes and seeds of a further run. Raises `BenchmarkError` if they contradict."""
    if old is None:
        return new
    if old.get("benchmark") != new["benchmark"]:
        raise BenchmarkError(f"{output} holds another kind of benchmark. Choose another `--output`.")
    differing = [(key, old[key], new[key]) for key in SAME_FOR_ALL if old[key] != new[key]]
    both = [(key, name) for key in ("methods", "forget") for name in old[key] if name in new[key]]
    differing += [(f"{key}: {name}", old[key][name], new[key][name]) for key, name in both if old[key][name] != new[key][name]]
    if differing:
        told = "; ".join(f"{what} is {was} there, {now} here" for what, was, now in differing)
        raise BenchmarkError(f"{output} holds results of another configuration ({told}). Choose another `--output`.")
    merged = {key: {**old[key], **new[key]} for key in ("methods", "forget")}
    return {**old, **merged, "seeds": max(old["seeds"], new["seeds"]), "runs": [*old["runs"], *new["runs"]]}


def method_settings(function: Callable, asked: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a method with their values: what was tuned for it, what was asked for, or its defaults."""
    own = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    own = {name: default for name, default in own.items() if name not in ("model", "splits", "seed", "fit")}
    if own.get("router", "") is None:  # one expert is what makes it what it is
        asked = {name: value for name, value in asked.items() if name != "num_experts"}
    return {name: tuned.get(name, asked.get(name, default)) for name, default in own.items()}


def refuse_unused(asked: Mapping[str, Any], tuned: Mapping[str, Mapping[str, Any]], functions: Mapping[str, Callable]) -> None:
    """Raise `BenchmarkError` for a setting that no method takes, or that a method does not."""
    taken = {name: set(inspect.signature(function).parameters) for name, function in functions.items()}
    if unknown := [key for key in asked if not any(key in names for names in taken.values())]:
        raise BenchmarkError(f"No method among {', '.join(functions)} takes `{unknown[0]}`.")
    if wrong := [(name, key) for name in functions for key in tuned.get(name, {}) if key not in taken[name]]:
        name, key = wrong[0]
        raise BenchmarkError(f"{name} takes no `{key}`. It takes {', '.join(sorted(taken[name] - {'model', 'splits', 'fit'}))}.")
