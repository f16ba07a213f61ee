"""`run_kd`: classes forgotten by every method in turn, each measured on accuracies, new probes, membership attacks and similarities."""

from __future__ import annotations

import copy
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from torch import Tensor, nn

from ...api import get_erasure
from ...classification.heads import find_heads
from ...core.files import write_text
from ..artists.store import BenchmarkError
from ..machine import peak_memory, processes
from ..methods.registry import CLASSIFICATION, UNREGISTERED, find_classification_method
from ..splits import KDData, split_by_class
from .data import load_kd_data
from .features import Cached, cache, head_only, reloaded, same_backbone, splits_of_features
from .measure import KnownProbes, Measurement, Places, measure
from .models import MODELS, pretrained_inputs
from .similarity import class_means
from .start import Trainer, leaving_out_what_diverges, start_run
from .tables import RELOADED, cells_of, write_outputs


JOINT = "+"  # between classes that are forgotten together
PLOTTED = 1000  # test samples whose features are kept for the plots


@dataclass(frozen=True)
class Known:
    """What calls on the same data and trained classifiers need not find twice: probes by their features, by seed what the head reads."""

    probes: KnownProbes = field(default_factory=dict)
    inputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)


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
    known: Known | None = None,
) -> list[dict[str, Any]]:
    """Train a classifier, let each method forget each entry of `forget`, and measure what is left.

    Under `accelerate launch` trainings are shared by all processes and the cells (method, forget, seed) are split over them. It can be
    killed at any point; the same call goes on where it was, and nothing is trained or measured twice. A baseline whose training
    diverges is left out with a warning.

    Args:
        dataset (`str`): a name of `load_kd_data`, or a folder of images.
        model (`str`): a name of `kd_models.MODELS`, trained from random weights, or a pretrained classifier's folder or Hub id.
        methods (`Sequence[str]`): names from `more_hf.bench.methods.registry.CLASSIFICATION`, or your own, `"my_module:my_erase"`. Ours
            get a row more, `-reloaded`: saved with `save_pretrained` and loaded without the erasure's hook.
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
        known (`Known`, *optional*): what earlier calls on the same data and trained classifiers found; what this one finds is added.

    Returns the lines of `summary.csv`.

    Raises `BenchmarkError` and `DatasetError` before anything is trained, if the arguments do not go together or `output` holds another
    benchmark.
    """
    state, output = processes(), Path(output)
    if seeds < 1 or probe_seeds < 1:
        raise BenchmarkError(f"Needs at least one seed and one probe seed, got {seeds} and {probe_seeds}.")
    functions = {name: find_classification_method(name, forgets="classes") for name in methods}
    data = load_kd_data(dataset, path=path, **({} if model in MODELS else pretrained_inputs(model)))
    entries = data.class_names if forget == "all" else [forget] if isinstance(forget, str) else list(forget)
    classes = {entry: _classes(entry, data) for entry in entries}
    config, trainer = start_run(
        "kd",
        data,
        model,
        functions,
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
            _Seed(trainer, seed, original, config, functions, classes, state, known or Known()).run(mine)
    state.wait_for_everyone()
    summary = write_outputs(output, config) if state.is_main_process else []
    state.wait_for_everyone()
    return summary


class _Seed:
    """Everything that the cells of one training have in common."""

    def __init__(self, trainer: Trainer, seed: int, original: nn.Module, config, functions, classes, state: PartialState, known: Known):
        self.trainer, self.seed, self.config, self.functions, self.classes = trainer, seed, config, functions, classes
        self.original, self.data, self.device = original.to(state.device), trainer.data, state.device
        sample = self.data.test[torch.arange(2)]["pixel_values"].to(self.device)
        self.head_name = next(iter(find_heads(self.original, sample)))
        self.parts = {"train": self.data.train, "test": self.data.test}
        self.known_inputs = seed in known.inputs
        if self.known_inputs:
            self.cached = Cached(known.inputs[seed], self.original, self.original.get_submodule(self.head_name))
        else:
            self.cached = self._cached(self.original)
            known.inputs[seed] = self.cached.inputs
        self.means = class_means(self.cached.features("train"), self.data.train.labels, len(self.data.class_names))
        self.known_probes = known.probes

    def run(self, cells: Sequence[Any]) -> None:
        bar = tqdm(total=len(cells), desc=f"{self.data.name}, seed {self.seed}", unit="cell", main_process_only=False)
        for entry in dict.fromkeys(cell.forget for cell in cells):
            splits = split_by_class(self.data, self.classes[entry])
            retrained = self._cached(self.trainer.retrained(splits.r, entry, self.seed)) if "retrain" in self.functions else None
            for cell in (cell for cell in cells if cell.forget == entry):
                bar.set_postfix_str(f"{cell.method} without {entry}")
                with leaving_out_what_diverges(cell):
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
        its cost is left empty; so it is where an earlier call had collected them.
        """
        function, settings = self.functions[cell.method], dict(self.config["methods"][cell.method])
        model, first = copy.deepcopy(self.original), (next(iter(self.config["forget"])), 0)
        if CLASSIFICATION.get(cell.method, UNREGISTERED).closed_form and (self.known_inputs or (cell.forget, cell.seed) != first):
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
            sent = [name for targets in erasure.facts.sent_to.values() for name in targets]
            return [self.data.class_names.index(name) for name in dict.fromkeys(sent)]
        if "target" not in settings or settings.get("against") == "rest":
            return []
        return [next(c for c in range(len(self.data.class_names)) if c not in forget) if settings["target"] is None else settings["target"]]


def _classes(entry: str, data: KDData) -> tuple[int, ...]:
    """Class ids of an entry of `forget`: names or numbers, joined by `+`."""
    names = [entry] if entry in data.class_names else entry.split(JOINT)
    return data.class_ids([name if name in data.class_names or not name.isdigit() else int(name) for name in names])


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
