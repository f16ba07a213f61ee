"""The knowledge-deletion benchmark: every method forgets classes in turn, and the result is measured."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm
from torch import nn

from more_hf import __version__
from more_hf.api import get_erasure
from more_hf.classification.heads import find_heads
from more_hf.core.errors import IncompatibleBaseError
from more_hf.core.files import replacing

from ..columns import rounded
from ..errors import BenchmarkError
from ..machine import peak_memory, processes, this_run
from ..methods.registry import CLASSIFICATION, UNREGISTERED, find_classification_method
from ..run import Cell, Run, held_settings, method_settings, refuse_unused_settings
from ..splits import KDData, Splits, some_of_each, split_by_class, split_by_sample
from .data import load_kd_data
from .features import (
    Cached,
    cache,
    head_only,
    invert_two_queries,
    reloaded,
    same_backbone,
    splits_of_features,
)
from .heads import Features, block_features, information
from .measure import LABELLED, PARTS, Informed, Places, Shared, head_information, measure
from .metrics import class_means
from .models import MODELS, pretrained_inputs
from .samples import measure_samples
from .store import CLASSES, SAMPLES, ClassesConfig, Training
from .summary import INVERTED, RELOADED
from .tables import write_outputs
from .training import Recipe, Trainer


logger = logging.getLogger(__name__)

JOINT = "+"  # between classes that are forgotten together
PLOTTED = 1000  # test samples whose features are kept for the plots
NOT_SETTINGS = ("model", "splits", "seed", "fit")  # parameters of a method that a benchmark fills in

Methods = Mapping[str, Callable[..., nn.Module]]


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
    learning_rate: float | None = None,
    num_workers: int = 0,
    mixed_precision: str | None = None,
    fraction: float = 0.1,
    probe_seeds: int = 5,
    passes: Sequence[int] = (16,),
    settings: Mapping[str, Any] | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
    shared: Shared | None = None,
) -> list[dict[str, Any]]:
    """Train a classifier, let each method forget each entry of `forget`, and measure what is left.

    Under `accelerate launch` trainings are shared by all processes and the cells (method, forget, seed) are
    split over them. A killed run continues with the same call; nothing is trained or measured twice. If a
    baseline diverges, its cell is skipped with a warning, and the same call retries it.

    A method of ours gets one more row, `-reloaded`: saved with `save_pretrained` and loaded without the
    erasure's hook. With random routing there are also, for each of `passes`, `-xK`, an attacker who asks K
    times and takes the mean, and `-inverted`, one who asks twice, knows the experts, and takes the feature
    that explains both answers.

    Args:
        output (`str` or `Path`): the folder for cells, rows, tables and plots. It may hold a part of the same
            benchmark.
        shared (`Shared`, *optional*): results of earlier calls on the same data and trained classifiers; this
            call's are added.
        others: the options of `more-hf bench kd`, whose help says what they are; `path` is its `data`.

    Returns:
        `list[dict]`: the lines of `summary.csv`.

    Raises:
        `BenchmarkError`: before anything is trained, if the arguments do not go together or
            `output` holds another benchmark.
    """
    output = Path(output)
    if seeds < 1 or probe_seeds < 1:
        raise BenchmarkError(f"Needs at least one seed and one probe seed, got {seeds} and {probe_seeds}.")
    entries = [forget] if isinstance(forget, str) else list(forget)
    of_samples = entries == ["samples"]
    forgets = "samples" if of_samples else "classes"
    functions = {name: find_classification_method(name, forgets=forgets) for name in methods}
    inputs = {} if model in MODELS else pretrained_inputs(model)
    data = load_kd_data(dataset, path=path, workers=num_workers, **inputs)
    recipe = Recipe.of(data, model, epochs=epochs, learning_rate=learning_rate)
    if recipe.epochs == 0 and (model in MODELS or "retrain" in functions):
        reason = f"{model} starts from random weights" if model in MODELS else "retrain trains a classifier"
        raise BenchmarkError(
            f"Nothing is trained in 0 epochs, and {reason}. "
            "Name a trained classifier's folder, or leave retrain out."
        )
    trainer = Trainer(model, data, recipe, Path(models or output / "models"), mixed_precision)
    classes: dict[str, tuple[int, ...]] = {}
    if of_samples:
        definitions = {f"{100 * fraction:g} % of samples": [f"{fraction}"]}
        evaluation = {"fraction": fraction}
    else:
        names = data.class_names if entries == ["all"] else entries
        classes = {entry: classes_of(entry, data) for entry in names}
        definitions = {entry: [data.class_names[c] for c in ids] for entry, ids in classes.items()}
        evaluation = {"probe_seeds": probe_seeds, "passes": list(passes)}
    config = ClassesConfig(
        benchmark=SAMPLES if of_samples else CLASSES,
        more_hf=__version__,
        training=Training(data.name, model, len(data.train), data.image_size, recipe),
        evaluation=evaluation,
        seeds=seeds,
        methods=settings_of(functions, settings or {}, tuned or {}, held_settings(output)),
        forget=definitions,
        runs=[this_run(processes())],
        class_names=[] if of_samples else list(data.class_names),
    )
    run = Run(config, output)
    shared = Shared() if shared is None else shared

    cells = run.config.cells(output)
    missing = run.missing([cell for cell in cells if cell.method in functions and cell.forget in definitions])
    for seed in sorted({cell.seed for cell in missing}):
        of_seed = [cell for cell in missing if cell.seed == seed]
        original = trainer.original(seed).to(run.state.device)
        splits = {}
        for entry in dict.fromkeys(cell.forget for cell in of_seed):
            if of_samples:
                splits[entry] = split_by_sample(data, fraction, seed=seed)
            else:
                splits[entry] = split_by_class(data, classes[entry])
            if "retrain" in functions:
                trainer.retrained(splits[entry].r, trained_without(entry, run.config), seed)
        mine = run.share(of_seed)
        if mine and of_samples:
            _measure_samples(mine, trainer, original, run, functions, splits)
        elif mine:
            of_classes = _Seed(trainer, seed, original, run, functions, classes, splits, shared)
            of_classes.measure_all(mine)
    return run.finish(write_outputs)


def trained_without(entry: str, config: ClassesConfig) -> str:
    """What Retrain's folder of an entry of `forget` is named after: of samples, their fraction."""
    return config.forget[entry][0] if config.forgets_samples else entry


def _measure_samples(
    cells: Sequence[Cell],
    trainer: Trainer,
    original: nn.Module,
    run: Run,
    functions: Methods,
    splits: Mapping[str, Splits],
) -> None:
    """Measure the cells of one seed that forget samples."""
    desc = f"{trainer.data.name}, seed {cells[0].seed}"
    for cell in tqdm(cells, desc=desc, unit="cell", main_process_only=False):
        with skipping_failure(cell, run):
            edited, cost = forget_cell(cell, original, splits[cell.forget], trainer, run.config, functions)
            measured = measure_samples(edited, splits[cell.forget], original.device)
            key = {"method": cell.method, "forget": cell.forget, "seed": cell.seed}
            cell.write({"rows": [rounded({**key, **measured, **vars(cost)})], "probes": []})


def settings_of(
    functions: Methods,
    settings: Mapping[str, Any],
    tuned: Mapping[str, Mapping[str, Any]],
    held: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Collect the settings of every method with their values: tuned, else given for all, else its default.

    What `held`, the settings of a folder's methods, does not know is left out at its default.

    Raises:
        `BenchmarkError`: for a setting that no method takes, or a tuned one that its method does not.
    """
    refuse_unused_settings(functions, settings, tuned, without=NOT_SETTINGS)
    collected = {}
    for name, function in functions.items():
        given = dict(settings)
        if method_settings(function, without=NOT_SETTINGS).get("router", "") is None:
            # A method that routes nowhere has its own number of experts, which no configuration records.
            given["num_experts"] = None
        own = tuned.get(name, {})
        collected[name] = method_settings(function, given, own, without=NOT_SETTINGS, held=held.get(name))
    return collected


def arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a method is called with: a number of experts that is not recorded is its default."""
    return {name: value for name, value in settings.items() if (name, value) != ("num_experts", None)}


@contextmanager
def skipping_failure(cell: Cell, run: Run) -> Iterator[None]:
    """If a baseline diverges, or a method of the user's own fails, skip its cell; the next run retries it."""
    what = f"{cell.method} without {cell.forget}, seed {cell.seed}"
    try:
        with run.going_on(cell.method, what):
            yield
    except IncompatibleBaseError as error:
        logger.warning("%s, is left out. %s", what, error)


@dataclass(frozen=True)
class Cost:
    """The cost of a method, in the columns of a row; empty where it was not measured."""

    seconds: float | None = None
    peak_memory: float | None = None


def forget_cell(
    cell: Cell,
    original: nn.Module,
    splits: Splits,
    trainer: Trainer,
    config: ClassesConfig,
    functions: Methods,
) -> tuple[nn.Module, Cost]:
    """Apply a cell's method to a copy of the original, and measure its time and memory."""
    function, model = functions[cell.method], copy.deepcopy(original)
    if cell.method == "retrain":
        # It takes its classifier from the trainer, and costs the time of that training.
        name = trained_without(cell.forget, config)
        edited = function(
            model, splits, seed=cell.seed, fit=lambda images, seed: trainer.retrained(images, name, seed)
        )
        return edited, Cost(trainer.seconds(name, cell.seed))
    with peak_memory(original.device) as peak:
        start = time.perf_counter()
        edited = function(model, splits, seed=cell.seed, **arguments(config.methods[cell.method]))
        if original.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    mebibytes = None if peak.mebibytes is None else round(peak.mebibytes, 1)
    return edited, Cost(round(seconds, 4), mebibytes)


class _Seed:
    """One trained classifier, and everything that its cells have in common."""

    def __init__(
        self,
        trainer: Trainer,
        seed: int,
        original: nn.Module,
        run: Run,
        functions: Methods,
        classes: Mapping[str, Sequence[int]],
        splits: Mapping[str, Splits],
        shared: Shared,
    ):
        self.trainer, self.seed, self.run, self.functions = trainer, seed, run, functions
        self.config = run.config
        self.classes, self.splits, self.shared = classes, splits, shared
        self.data, self.original = trainer.data, original
        sample = self.data.test[torch.arange(2)]["pixel_values"].to(original.device)
        self.head_name = next(iter(find_heads(self.original, sample)))
        self.has_shared_inputs = seed in shared.inputs
        if self.has_shared_inputs:
            head = self.original.get_submodule(self.head_name)
            self.cached = Cached(shared.inputs[seed], self.original, head)
        else:
            self.cached = self._cache(self.original)
            shared.inputs[seed] = self.cached.inputs
        labels = self.data.train.labels
        self.means = class_means(self.cached.features("train"), labels, len(self.data.class_names))
        some = some_of_each(labels, LABELLED)
        self.labelled = {"train": self.data.train.subset(some), "test": self.data.test}
        self.blocks: list[Features] = []  # of the original, once somebody asks

    def measure_all(self, cells: Sequence[Cell]) -> None:
        description = f"{self.data.name}, seed {self.seed}"
        bar = tqdm(total=len(cells), desc=description, unit="cell", main_process_only=False)
        for entry in dict.fromkeys(cell.forget for cell in cells):
            splits = self.splits[entry]
            retrained = informed = None
            if "retrain" in self.functions:
                retrained = self._cache(self.trainer.retrained(splits.r, entry, self.seed))
                informed = self._informed(retrained, splits)
            for cell in cells:
                if cell.forget == entry:
                    bar.set_postfix_str(f"{cell.method} without {entry}")
                    with skipping_failure(cell, self.run):
                        self._measure(cell, splits, retrained, informed)
                    bar.update()
        bar.close()

    def _cache(self, model: nn.Module) -> Cached:
        """The inputs of a model's head; those of the original where the backbone is the original's."""
        model = model.to(self.original.device)
        head = model.get_submodule(self.head_name)
        if model is not self.original and same_backbone(model, self.original, self.head_name):
            return Cached(self.cached.inputs, model, head)
        folder = None
        if model is self.original and not isinstance(self.data.train.images, torch.Tensor):
            folder = self.trainer.folder_of(self.seed)
        return cache(model, head, {"train": self.data.train, "test": self.data.test}, folder=folder)

    def _informed(self, retrained: Cached, splits: Splits) -> Informed:
        """What the index of information of the original's backbone needs."""
        places, both = Places.of(self.data, splits), []
        for cached in (self.cached, retrained):
            blocks = self._block_information(cached.model, places)
            features = {part: cached.features(part) for part in PARTS}
            both.append([*blocks, head_information(features, places)])
        original, theirs = both
        return Informed(original[:-1], original, theirs)

    def _block_information(self, model: nn.Module, places: Places) -> list[float]:
        """The information in every block of a model, by labelled images."""
        if model is self.original:
            self.blocks = self.blocks or block_features(model, self.labelled)
            blocks = self.blocks
        else:
            blocks = block_features(model, self.labelled)
        forget = self.labelled["train"].labels[:, None] == places.labels["train"][places.mask["f"]].unique()
        forgotten = {"train": forget.any(1), "test": places.mask["ft"]}
        return [information(z, forgotten) for z in blocks]

    def _measure(
        self, cell: Cell, splits: Splits, retrained: Cached | None, informed: Informed | None
    ) -> None:
        """Measure one cell: the method, its rows, and last the file that makes it done."""
        edited, cost = self._forget(cell, splits)
        places, forget = Places.of(self.data, splits), self.classes[cell.forget]
        settings = self.config.methods[cell.method]
        targets = targets_of(edited, settings, forget, self.data.class_names)
        rows, probes = [], []
        arrays = {"labels": self.data.test.labels[:PLOTTED].numpy()}
        if informed is not None and not same_backbone(edited, self.original, self.head_name):
            informed = replace(informed, blocks=self._block_information(edited, places))
        for name, cached, passes in self._variants(cell.method, edited):
            measured = measure(
                cached,
                places,
                forget=forget,
                targets=targets,
                original=self.cached,
                retrained=retrained,
                original_means=self.means,
                probe_seeds=range(self.config.evaluation["probe_seeds"]),
                informed=informed,
                passes=passes,
                shared=self.shared,
            )
            key = {"method": name, "forget": cell.forget, "seed": self.seed}
            sent_to = ", ".join(self.data.class_names[c] for c in targets)
            rows.append(rounded({**key, "sent_to": sent_to, **measured.row, **vars(cost)}))
            probes += [rounded({**key, **probe}) for probe in measured.probes]
            arrays[f"{name}/means"] = measured.means.float().numpy()
            arrays[f"{name}/features"] = measured.test_features[:PLOTTED].numpy()
        if self.seed == 0:
            with replacing(cell.path.with_suffix(".npz")) as draft, draft.open("wb") as file:
                np.savez_compressed(file, **arrays)
        cell.write({"rows": rows, "probes": probes})

    def _forget(self, cell: Cell, splits: Splits) -> tuple[nn.Module, Cost]:
        """Apply the cell's method to a copy of the original.

        A closed form needs nothing of the backbone but the features that are cached already. Only its first
        cell gets the images, and so a cost, unless an earlier run had collected the features.
        """
        is_first = cell.forget == next(iter(self.config.forget)) and cell.seed == 0
        is_closed_form = CLASSIFICATION.get(cell.method, UNREGISTERED).closed_form
        if is_closed_form and (self.has_shared_inputs or not is_first):
            function, settings = self.functions[cell.method], arguments(self.config.methods[cell.method])
            model = copy.deepcopy(self.original)
            with head_only(model, model.get_submodule(self.head_name)):
                features = splits_of_features(splits, self.data.train, self.cached.inputs["train"])
                return function(model, features, seed=self.seed, **settings), Cost()
        return forget_cell(cell, self.original, splits, self.trainer, self.config, self.functions)

    def _variants(self, method: str, edited: nn.Module) -> Iterator[tuple[str, Cached, int]]:
        """The edited model; ours also after loading, and asked several times where its router draws."""
        cached = self._cache(edited)
        yield method, cached, 1
        if get_erasure(edited) is not None:
            with reloaded(edited) as plain:
                loaded = self._cache(plain)
                yield method + RELOADED, loaded, 1
                if cached.is_random:
                    inverted = {part: invert_two_queries(cached, part) for part in PARTS}
                    yield method + INVERTED, replace(loaded, inputs=inverted), 1
        if cached.is_random:
            for passes in self.config.evaluation["passes"]:
                yield f"{method}-x{passes}", cached, passes


def targets_of(
    edited: nn.Module, settings: Mapping[str, Any], forget: Sequence[int], class_names: Sequence[str]
) -> list[int]:
    """The classes that the forgotten ones were sent to, or that the method made them alike."""
    erasure = get_erasure(edited)
    if erasure is not None:
        names = [name for targets in erasure.facts.sent_to.values() for name in targets]
        return [class_names.index(name) for name in dict.fromkeys(names)]
    if "target" not in settings or settings.get("against") == "rest":
        return []
    if settings["target"] is not None:
        return [settings["target"]]
    # By default these methods take the first remaining class.
    return [next(c for c in range(len(class_names)) if c not in forget)]


def classes_of(entry: str, data: KDData) -> tuple[int, ...]:
    """Class ids of an entry of `forget`: names or numbers, joined by `+`, unless it is a name itself."""
    parts = [entry] if entry in data.class_names else entry.split(JOINT)
    return data.class_ids(
        [int(part) if part.isdigit() and part not in data.class_names else part for part in parts]
    )
