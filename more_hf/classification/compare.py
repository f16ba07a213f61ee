"""`compare` for classifiers: every class's accuracy before and after an erasure, as a table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.errors import PrototypeError
from ..core.markdown import markdown_table
from .erase import get_erasure
from .features import inputs_of, plain_model
from .heads import evaluating, run
from .names import class_names


LISTED = 40  # classes that a table shows at most


@dataclass(frozen=True)
class ClassAccuracy:
    """How one class's images are classified."""

    name: str
    forgotten: bool
    count: int  # how many images it has
    before: float | None  # percent of them that the original gets right; `None` if the original is not here
    after: float  # percent of them that the model gets right

    @property
    def change(self) -> float:
        """How far the accuracy moved; the accuracy itself if nothing is known of before."""
        return abs(self.after - (self.before or 0))


@dataclass(frozen=True)
class Accuracies:
    """
    Every class's accuracy before and after an erasure, as `more_hf.compare` returns it for a classifier.

    Args:
        classes (`tuple[ClassAccuracy, ...]`):
            Every class that the data has images of, in the model's order.
    """

    classes: tuple[ClassAccuracy, ...]

    @classmethod
    def from_facts(cls, accuracy: Mapping[str, Mapping[str, float]], forgotten: Collection[str]) -> Self:
        """The inverse of `to_facts`."""
        classes = []
        for name, one in accuracy.items():
            found = name in forgotten, int(one["images"]), one["before"], one["after"]
            classes.append(ClassAccuracy(name, *found))
        return cls(tuple(classes))

    def to_facts(self) -> dict[str, dict[str, float]]:
        """The accuracies as `ClassFacts.accuracy` holds them."""
        return {
            one.name: {"images": one.count, "before": one.before, "after": one.after} for one in self.classes
        }

    @property
    def listed(self) -> tuple[ClassAccuracy, ...]:
        """What a table shows: all, or of many those that are forgotten or moved farthest."""
        first = sorted(self.classes, key=lambda one: (not one.forgotten, -one.change))[:LISTED]
        return tuple(one for one in self.classes if one in first)

    def to_markdown(self) -> str:
        """A table in percent, with the accuracy over all images of forgotten classes and of the others."""
        listed = self.listed
        rows = [_row(f"{one.name} (forgotten)" if one.forgotten else one.name, [one]) for one in listed]
        left_out = [one for one in self.classes if one not in listed]
        if left_out:
            rows.append(_row(f"{len(left_out)} that moved less", left_out))
        for name, forgotten in (("forgotten, together", True), ("the others, together", False)):
            part = [one for one in self.classes if one.forgotten == forgotten]
            if part:
                rows.append(_row(name, part))
        return markdown_table(rows)

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def compare(
    model: nn.Module,
    data: Iterable[Any],
    *,
    show_original: Callable[[], AbstractContextManager[nn.Module | None]],
    seeded: Callable[[nn.Module, Sequence[int]], AbstractContextManager[Any]],
) -> Accuracies:
    """
    `more_hf.compare` for classifiers: one pass over the data, in eval mode.

    Args:
        show_original (`Callable`):
            Gives a block and in it the classifier that answers as the original, or `None`.
        seeded (`Callable`):
            Gives a block in which a classifier's router depends on the seeds alone.
    """
    erasure, plain = get_erasure(model), plain_model(model)
    hits: dict[str, list[Tensor]] = {"before": [], "after": []}
    labels: list[Tensor] = []
    seen = 0
    with evaluating(plain):
        for samples, batch_labels in inputs_of(plain, data):
            labels.append(batch_labels.cpu())
            # What a router does with a sample depends on its place in the data, not on what ran before.
            seeds = range(seen, seen + len(batch_labels))
            seen += len(batch_labels)
            with seeded(model, seeds):
                logits = run(plain, samples)
            hits["after"].append(logits.argmax(1).cpu() == labels[-1])
            with show_original() as source:
                if source is not None:
                    original = plain_model(source)
                    with evaluating(original):
                        before = run(original, samples).argmax(1).cpu()
                    hits["before"].append(before == labels[-1])
    if not labels:
        raise PrototypeError("The data has no batch. Accuracies need at least one.")

    names = class_names(plain, logits.shape[1])
    found = torch.cat(labels)
    if found.max() >= len(names):
        highest = int(found.max())
        raise PrototypeError(
            f"An image has the label {highest}, and the model has {len(names)} classes. Pass data of these "
            "classes."
        )
    percent = {when: _percent(found, torch.cat(parts), len(names)) for when, parts in hits.items() if parts}
    before = percent.get("before", [None] * len(names))
    counts = torch.bincount(found[found >= 0], minlength=len(names)).tolist()
    forgotten = [] if erasure is None else erasure.concepts
    classes = []
    for number, name in enumerate(names):
        if counts[number]:
            own = before[number], percent["after"][number]
            classes.append(ClassAccuracy(name, name in forgotten, counts[number], *own))
    return Accuracies(tuple(classes))


def _percent(labels: Tensor, hits: Tensor, num_classes: int) -> list[float]:
    """The share of each class's images that are hits; 0 for a class without an image."""
    counted = labels >= 0
    counts = torch.bincount(labels[counted], minlength=num_classes)
    right = torch.bincount(labels[counted & hits], minlength=num_classes)
    return (100 * right / counts.clamp_min(1)).tolist()


def _row(name: str, classes: Sequence[ClassAccuracy]) -> dict[str, Any]:
    """A line of the table: one class, or several together, over all of their images."""
    count = sum(one.count for one in classes)
    row = {"class": name, "images": count}
    if classes[0].before is not None:
        row["before"] = sum(one.count * one.before for one in classes) / count
    return {**row, "after": sum(one.count * one.after for one in classes) / count}
