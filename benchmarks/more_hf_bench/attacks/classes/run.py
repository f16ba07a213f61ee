"""Every attack on every method that makes classifiers forget classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from more_hf import __version__
from more_hf.classification.heads import find_heads
from more_hf.data import CLASSIFIERS, load_classifier

from ...classes.data import load_kd_data
from ...classes.features import Cached, cache, head_only, reloaded, same_backbone, splits_of_features
from ...classes.models import load_pretrained, pretrained_inputs
from ...classes.run import arguments, classes_of, settings_of, targets_of
from ...classes.summary import RELOADED
from ...classes.training import Recipe, train_classifier, without
from ...machine import processes, this_run
from ...methods.registry import CLASSIFICATION, UNREGISTERED, find_classification_method
from ...run import Cell, held_settings
from ...splits import ImageSet, KDData, Splits, some_of_each, split_by_class
from ..run import attack_settings, run_attacks
from ..store import AttackConfig
from .victim import Seen, Victim


ORIGINAL, RETRAIN, RANDOM = "original", "retrain", "random-weights"
REFERENCES = (ORIGINAL, RETRAIN, RANDOM)
"""What gives the numbers a meaning: the classifier before the erasure, the same architecture trained without
what is forgotten, and the same architecture with random weights."""


def run_class_attacks(
    dataset: str,
    models: Sequence[str],
    methods: Sequence[str],
    attacks: Sequence[str],
    forget: Sequence[str],
    *,
    output: str | Path,
    seeds: int = 1,
    limit: int | None = None,
    path: str | Path | None = None,
    trainings: str | Path | None = None,
    epochs: int | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Let each method erase each entry of `forget` from each trained classifier, and run every attack.

    The `REFERENCES` are always run; only Retrain is left out with 0 epochs. It is trained once, and the
    weights of the third are drawn once, however many runs (`seeds`) of each method and attack there are.

    Args:
        models (`Sequence[str]`): trained classifiers that read the data in the same way: names of
            `more_hf.data.CLASSIFIERS`, folders or Hub ids.
        methods (`Sequence[str]`): as in `run_kd`; a name that ends in `-reloaded` is what plain
            transformers loads of it.
        output (`str` or `Path`): the folder for cells, rows, tables and the picture.
        others: the options of `more-hf bench attacks`, whose help says what they are; `path` is its `data`,
            `trainings` its `models`.

    Returns:
        `list[dict]`: the lines of `summary.csv`.

    Raises:
        `BenchmarkError`: before anything is run, if the arguments do not go together or
            `output` holds another benchmark.
    """
    named = dict.fromkeys(name for name in methods if name not in REFERENCES)
    functions = {}
    for name in named:
        functions[name] = find_classification_method(name.removesuffix(RELOADED), forgets="classes")
    tuned = tuned or {}
    inputs = {} if models[0] in CLASSIFIERS else pretrained_inputs(models[0])
    data = load_kd_data(dataset, path=path, **inputs)
    recipe = Recipe.of(data, epochs=epochs)
    references = [name for name in REFERENCES if name != RETRAIN or recipe.epochs]
    classes = {entry: classes_of(entry, data) for entry in forget}
    originals = {name: load_victim(name, data) for name in dict.fromkeys(models)}
    own = {name: tuned.get(name.removesuffix(RELOADED), {}) for name in named}
    erased = settings_of(functions, {}, own, held_settings(output))
    config = AttackConfig(
        benchmark="attacks-classes",
        more_hf=__version__,
        evaluation={"dataset": data.name, "labelled": limit, "retraining": asdict(recipe)},
        references=references,
        models={name: {"parameters": model.num_parameters()} for name, model in originals.items()},
        methods={**{name: {} for name in references}, **erased},
        forget={entry: [data.class_names[c] for c in ids] for entry, ids in classes.items()},
        attacks=attack_settings("classes", attacks, tuned, output),
        seeds=seeds,
        runs=[this_run(processes())],
    )
    folder = Path(trainings or Path(output) / "models")
    victims = Victims(data, originals, functions, erased, classes, limit, recipe, folder)
    return run_attacks(config, victims, output=output)


def load_victim(name: str, data: KDData) -> PreTrainedModel:
    """Load a trained classifier in evaluation mode."""
    return (load_classifier(name) if name in CLASSIFIERS else load_pretrained(name, data)).eval()


@dataclass(frozen=True)
class Original:
    """A classifier before the erasure, the name of its head, and what that reads of all training images."""

    seen: Seen
    head: str
    train: Tensor


class Victims:
    """Makes the victims of a run, one after the other. What they have in common is made once."""

    def __init__(
        self,
        data: KDData,
        models: Mapping[str, PreTrainedModel],
        functions: Mapping[str, Callable[..., nn.Module]],
        methods: Mapping[str, Mapping[str, Any]],
        classes: Mapping[str, Sequence[int]],
        limit: int | None,
        recipe: Recipe,
        folder: Path,
    ):
        self.data, self.models, self.functions, self.methods = data, models, functions, methods
        self.classes, self.recipe, self.folder = classes, recipe, folder
        self.labelled = some_of_each(data.train.labels, limit)
        self.parts = {"train": data.train.subset(self.labelled), "test": data.test}
        self.made: dict[tuple[str, ...], Any] = {}

    def __call__(self, cell: Cell) -> Victim:
        original = self._once(cell.model, make=lambda: self._original(self.models[cell.model]))
        forget, targets = self.classes[cell.forget], []
        splits, retrained = split_by_class(self.data, forget), None
        if self.recipe.epochs:
            key = RETRAIN, cell.model, cell.forget
            retrained = self._once(*key, make=lambda: self._retrained(cell, original, splits))
        if cell.method == ORIGINAL:
            seen = original.seen
        elif cell.method == RETRAIN:
            seen = retrained
        elif cell.method == RANDOM:
            start = original.seen.cached.model
            seen = self._once(RANDOM, cell.model, make=lambda: self._seen(random_weights(start, 0), original))
        else:
            model = self._erased(cell, original, splits)
            targets = targets_of(model, self.methods[cell.method], forget, self.data.class_names)
            if cell.method.endswith(RELOADED):
                with reloaded(model) as plain:
                    model = plain
            seen = self._seen(model, original)
        train = partial(self._train, cell.model) if self.recipe.epochs else None
        return Victim(
            seen, original.seen, retrained, original.head, self.parts, forget, targets, train, cell.seed
        )

    def _once(self, *key: str, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def _original(self, model: PreTrainedModel) -> Original:
        model = model.to(processes().device)
        sample = self.data.test[torch.arange(2)]["pixel_values"].to(model.device)
        name, head = next(iter(find_heads(model, sample).items()))
        cached = cache(model, head, {"train": self.data.train, "test": self.data.test})
        train = cached.inputs["train"]
        inputs = {"train": train[self.labelled], "test": cached.inputs["test"]}
        return Original(Seen(Cached(inputs, model, head)), name, train)

    def _seen(self, model: nn.Module, original: Original) -> Seen:
        """What a model's head reads: the same as the original's where the backbone is the original's."""
        head, before = model.get_submodule(original.head), original.seen
        if same_backbone(model, before.cached.model, original.head):
            return Seen(Cached(before.cached.inputs, model, head), before.memory)
        return Seen(cache(model, head, self.parts))

    def _erased(self, cell: Cell, original: Original, splits: Splits) -> nn.Module:
        """Apply a method to a copy of the original; a closed form needs only the cached features."""
        function, settings = self.functions[cell.method], arguments(self.methods[cell.method])
        model = copy.deepcopy(original.seen.cached.model)
        method = CLASSIFICATION.get(cell.method.removesuffix(RELOADED), UNREGISTERED)
        if not method.closed_form:
            return function(model, splits, seed=cell.seed, **settings)
        with head_only(model, model.get_submodule(original.head)):
            features = splits_of_features(splits, self.data.train, original.train)
            return function(model, features, seed=cell.seed, **settings)

    def _retrained(self, cell: Cell, original: Original, splits: Splits) -> Seen:
        return self._seen(self._train(cell.model, splits.r, without(cell.forget, 0), 0), original)

    def _train(self, name: str, images: ImageSet, folder: str, seed: int) -> PreTrainedModel:
        """Train the architecture of a model from random weights, or take what an earlier call has trained."""
        start, desc = random_weights(self.models[name], seed), f"{Path(name).name}-{folder}"
        recipe = replace(self.recipe, seed=seed)
        return train_classifier(start, images, recipe, output=self.folder / desc, desc=desc)


def random_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same architecture with new weights, in evaluation mode on the same device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageClassification.from_config(model.config).eval().to(model.device)
