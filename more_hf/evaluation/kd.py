"""`run_kd`: classes forgotten by every method in turn, each measured on accuracies, new probes, membership attacks and similarities."""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from torch import nn

from .. import __version__
from ..baselines import CLASSIFICATION, CLOSED_FORM, SAMPLES_ONLY, classification_baseline
from ..classification.heads import find_heads
from ..report import write_text
from ..verbs import get_erasure
from .cells import BenchmarkError, read_config
from .kd_data import ImageSet, KDData, load_kd_data, split_by_class
from .kd_features import Cached, cache, head_only, reloaded, same_backbone, splits_of_features
from .kd_measure import KnownProbes, Measurement, Places, measure
from .kd_models import MODELS, build_classifier, load_pretrained, pretrained_inputs
from .kd_outputs import RELOADED, cells_of, write_outputs
from .kd_training import Recipe, train_classifier
from .machine import peak_memory, processes, this_run
from .similarity import class_means


RECIPES = {"digits": Recipe(epochs=30, batch_size=64, warmup_steps=20, shift=1), "emoji-100": Recipe(epochs=12)}
"""Training recipes of data sets that need another than the default."""

JOINT = "+"  # between classes that are forgotten together
PLOTTED = 1000  # test samples whose features are kept for the plots
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


def without(forget: str, seed: int) -> str:
    """The end of a retraining's folder name; a hash where a hundred classes would make it too long for a file system."""
    name = forget.replace("/", "_")
    return f"without-{name if len(name) <= 100 else hashlib.sha256(forget.encode()).hexdigest()[:16]}-seed{seed}"


def run_kd(
    dataset: str,
    model: str,
    methods: Sequence[str],
    forget: str | Sequence[str],
    *,
    output: str | Path,
    seeds: int = 1,
    path: str | Path | None = None,
    models: str | Path | None = None,
    epochs: int | None = None,
    probe_seeds: int = 5,
    passes: Sequence[int] = (16,),
    settings: Mapping[str, Any] | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
    known_probes: KnownProbes | None = None,
) -> list[dict[str, Any]]:
    """Train a classifier, let each method forget each entry of `forget`, and measure what is left.

    Under `accelerate launch` trainings are shared by all processes and the cells (method, forget, seed) are split over them. It can be
    killed at any point; the same call goes on where it was, and nothing is trained or measured twice.

    Args:
        dataset (`str`): a name of `load_kd_data`, or a folder of images.
        model (`str`): a name of `kd_models.MODELS`, trained from random weights, or a pretrained classifier's folder or Hub id.
        methods (`Sequence[str]`): names from `more_hf.baselines.CLASSIFICATION`. Ours get a row more, `-reloaded`: saved with
            `save_pretrained` and loaded without the erasure's hook.
        forget (`str` or `Sequence[str]`): classes to forget, one after the other, by name or number; `"a+b"` forgets both together;
            `"all"` for every class in turn.
        output (`str` or `Path`): the folder that gets cells, rows, tables and plots. It may hold a part of the same benchmark.
        seeds (`int`, defaults to 1): trainings and runs of each method: seeds 0, 1, ...
        path (*optional*): where the data lie, if not in their usual place.
        models (*optional*): the folder of trained classifiers; by default `models` in `output`.
        epochs (`int`, *optional*): of every training; by default the recipe's.
        probe_seeds (`int`, defaults to 5): new heads per learning rate.
        passes (`Sequence[int]`, defaults to `(16,)`): methods with random routing get a row more for each, `-xK`: an attacker who asks K
            times and takes the mean.
        settings (`Mapping`, *optional*): arguments for every method that takes them. tuned (`Mapping`, *optional*): method to its own.
        known_probes (`dict`, *optional*): probes of earlier calls on the same data, by their features; this call's are added.

    Returns the lines of `summary.csv`.

    Raises `BenchmarkError` and `DatasetError` before anything is trained, if the arguments do not go together or `output` holds another
    benchmark.
    """
    state, output = processes(), Path(output)
    if seeds < 1 or probe_seeds < 1:
        raise BenchmarkError(f"Needs at least one seed and one probe seed, got {seeds} and {probe_seeds}.")
    possible = [name for name in CLASSIFICATION if name not in SAMPLES_ONLY]
    if unknown := [name for name in methods if name not in possible]:
        raise BenchmarkError(f"There is no method {unknown[0]!r} that forgets classes. There are: {', '.join(possible)}.")
    data = load_kd_data(dataset, path=path, **({} if model in MODELS else pretrained_inputs(model)))
    entries = data.class_names if forget == "all" else [forget] if isinstance(forget, str) else list(forget)
    classes = {entry: _classes(entry, data) for entry in entries}
    config, functions, trainer = start_run(
        "kd",
        data,
        model,
        methods,
        {entry: [data.class_names[c] for c in ids] for entry, ids in classes.items()},
        {"evaluation": {"probe_seeds": probe_seeds, "passes": list(passes)}, "class_names": list(data.class_names)},
        output=output,
        seeds=seeds,
        models=models,
        epochs=epochs,
        settings=settings or {},
        tuned=tuned or {},
    )
    todo = [cell for cell in cells_of(output, config) if not cell.path.is_file() and cell.method in functions and cell.forget in classes]
    for seed in sorted({cell.seed for cell in todo}):
        original = trainer.original(seed)
        if "retrain" in functions:
            for entry in dict.fromkeys(cell.forget for cell in todo if cell.seed == seed):
                trainer.retrained(split_by_class(data, classes[entry]).r, entry, seed)
        mine = [cell for cell in todo if cell.seed == seed][state.process_index :: state.num_processes]
        if mine:
            _Seed(trainer, seed, original, config, functions, classes, state, known_probes).run(mine)
    state.wait_for_everyone()
    summary = write_outputs(output, config) if state.is_main_process else []
    state.wait_for_everyone()
    return summary


def start_run(
    benchmark: str,
    data: KDData,
    model: str,
    methods: Sequence[str],
    forget: Mapping[str, list[str]],
    facts: Mapping[str, Any],
    *,
    output: Path,
    seeds: int,
    models: str | Path | None,
    epochs: int | None,
    settings: Mapping[str, Any],
    tuned: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, Callable], Trainer]:
    """What a benchmark of any kind starts with: its configuration, which it writes, joined with what `output` holds; the methods'
    functions; the trainer. `facts` are further entries of the configuration. Raises `BenchmarkError` before anything is written."""
    state = processes()
    functions = {name: classification_baseline(name) for name in methods}
    refuse_unused(settings, tuned, functions)
    recipe = replace(RECIPES.get(data.name, Recipe()), flip=data.flip)
    recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
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
    return config, functions, Trainer(model, data, recipe, Path(models or output / "models"))


class _Seed:
    """Everything that the cells of one training have in common."""

    def __init__(self, trainer: Trainer, seed: int, original: nn.Module, config, functions, classes, state: PartialState, known_probes):
        self.trainer, self.seed, self.config, self.functions, self.classes = trainer, seed, config, functions, classes
        self.original, self.data, self.device = original.to(state.device), trainer.data, state.device
        sample = self.data.test[torch.arange(2)]["pixel_values"].to(self.device)
        self.head_name = next(iter(find_heads(self.original, sample)))
        self.parts = {"train": self.data.train, "test": self.data.test}
        self.cached = self._cached(self.original)
        self.means = class_means(self.cached.features("train"), self.data.train.labels, len(self.data.class_names))
        self.known_probes: KnownProbes = {} if known_probes is None else known_probes

    def run(self, cells: Sequence[Any]) -> None:
        bar = tqdm(total=len(cells), desc=f"{self.data.name}, seed {self.seed}", unit="cell", main_process_only=False)
        for entry in dict.fromkeys(cell.forget for cell in cells):
            splits = split_by_class(self.data, self.classes[entry])
            retrained = self._cached(self.trainer.retrained(splits.r, entry, self.seed)) if "retrain" in self.functions else None
            for cell in (cell for cell in cells if cell.forget == entry):
                bar.set_postfix_str(f"{cell.method} without {entry}")
                self._measure(cell, splits, retrained)
                bar.update()
        bar.close()

    def _cached(self, model: nn.Module) -> Cached:
        model = model.to(self.device)
        head = model.get_submodule(self.head_name)
        if model is not self.original and same_backbone(model, self.original, self.head_name):
            return Cached(self.cached.inputs, model, head)
        return cache(model, head, self.parts)

    def _measure(self, cell, splits, retrained: Cached | None) -> None:
        """One cell: the method, its rows, and the file that makes it count."""
        settings = self.config["methods"][cell.method]
        edited, cost = self._edited(cell, splits)
        places, forget = Places.of(self.data, splits), self.classes[cell.forget]
        targets = self._targets(edited, settings, forget)
        rows, probes, plots = [], [], {}
        for name, cached, passes in self._variants(cell.method, edited):
            measured: Measurement = measure(
                cached,
                places,
                forget=forget,
                targets=targets,
                original=self.cached,
                retrained=retrained,
                original_means=self.means,
                probe_seeds=range(self.config["evaluation"]["probe_seeds"]),
                passes=passes,
                known_probes=self.known_probes,
            )
            told = {"method": name, "forget": cell.forget, "seed": self.seed}
            sent = ", ".join(self.data.class_names[c] for c in targets)
            rows.append({**told, "sent_to": sent, **measured.row, **cost})
            probes += [{**told, **probe} for probe in measured.probes]
            plots[f"{name}/means"] = measured.means.float().numpy()
            plots[f"{name}/features"] = measured.test_features[:PLOTTED].numpy()
        if self.seed == 0:
            _write_arrays(cell.path.with_suffix(".npz"), {**plots, "labels": self.data.test.labels[:PLOTTED].numpy()})
        write_text(cell.path, json.dumps({"rows": _plain(rows), "probes": _plain(probes)}))

    def _edited(self, cell, splits) -> tuple[nn.Module, dict[str, float | None]]:
        """The model after the method, and what that cost.

        A closed form asks the backbone for nothing but the features that are cached: from the second entry or seed on it gets these, and
        its cost is left empty.
        """
        function, settings = self.functions[cell.method], dict(self.config["methods"][cell.method])
        model, first = copy.deepcopy(self.original), (next(iter(self.config["forget"])), 0)
        if cell.method in CLOSED_FORM and (cell.forget, cell.seed) != first:
            with head_only(model, model.get_submodule(self.head_name)):
                features = splits_of_features(splits, self.data.train, self.cached.inputs["train"])
                return function(model, features, seed=self.seed, **settings), {"seconds": None, "peak_memory": None}
        if retraining := cell.method == "retrain":
            settings["fit"] = lambda images, seed: self.trainer.retrained(images, cell.forget, seed)
        with peak_memory(self.device) as peak:
            start = time.perf_counter()
            edited = function(model, splits, seed=self.seed, **settings)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        return edited, {
            "seconds": self.trainer.seconds(cell.forget, self.seed) if retraining else round(seconds, 4),
            "peak_memory": None if retraining or peak.mebibytes is None else round(peak.mebibytes, 1),
        }

    def _variants(self, method: str, edited: nn.Module) -> Iterator[tuple[str, Cached, int]]:
        """The edited model; ours also as it is after saving and loading, and asked several times where its router draws."""
        cached = self._cached(edited)
        yield method, cached, 1
        if get_erasure(edited) is not None:
            with reloaded(edited) as plain:
                yield method + RELOADED, self._cached(plain), 1
        if cached.is_random:
            for passes in self.config["evaluation"]["passes"]:
                yield f"{method}-x{passes}", cached, passes

    def _targets(self, edited: nn.Module, settings: Mapping[str, Any], forget: Sequence[int]) -> list[int]:
        """Class ids that the forgotten classes were sent to, or that a method was told to make them like; else empty."""
        if (erasure := get_erasure(edited)) is not None:
            sent = [name for targets in erasure.facts["sent_to"].values() for name in targets]
            return [self.data.class_names.index(name) for name in dict.fromkeys(sent)]
        if "target" not in settings or settings.get("against") == "rest":
            return []
        return [next(c for c in range(len(self.data.class_names)) if c not in forget) if settings["target"] is None else settings["target"]]


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


def _classes(entry: str, data: KDData) -> tuple[int, ...]:
    """Class ids of an entry of `forget`: names or numbers, joined by `+`."""
    names = [entry] if entry in data.class_names else entry.split(JOINT)
    return data.class_ids([name if name in data.class_names or not name.isdigit() else int(name) for name in names])


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


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_bytes(data.getvalue())
    beside.replace(path)


def _plain(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Numbers that JSON has: NaN becomes `None`, floats keep six decimals."""
    return [
        {key: (None if value != value else round(value, 6)) if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]
