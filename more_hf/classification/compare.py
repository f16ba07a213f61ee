"""`compare` for classifiers: every class's accuracy before and after an erasure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import MoreError, PrototypeError
from .accuracies import Accuracies, ClassAccuracy
from .erase import get_erasure
from .features import inputs_of, plain_model, with_bar
from .heads import evaluating, run
from .names import class_names


TAKERS = 5  # classes that a forgotten class's samples became, in the record


def compare(
    model: nn.Module,
    data: Iterable[Any],
    *,
    show_original: Callable[[], AbstractContextManager[nn.Module | None]],
    seeded: Callable[[nn.Module, Sequence[int]], AbstractContextManager[Any]],
) -> Accuracies:
    """
    `more_hf.compare` for classifiers: one pass over the data, in eval mode.

    `show_original` gives a block and in it the classifier that answers as the original, or `None`; `seeded`
    one in which a classifier's router depends on the seeds alone.
    """
    erasure, plain = get_erasure(model), plain_model(model)
    predicted: dict[str, list[Tensor]] = {"before": [], "after": []}
    labels: list[Tensor] = []
    seen = 0
    with evaluating(plain):
        for samples, batch_labels in inputs_of(plain, with_bar(data, "Comparing")):
            labels.append(batch_labels.cpu())
            # What a router does with a sample depends on its place in the data, not on what ran before.
            seeds = range(seen, seen + len(batch_labels))
            seen += len(batch_labels)
            with seeded(model, seeds):
                logits = run(plain, samples)
            predicted["after"].append(logits.argmax(1).cpu())
            with show_original() as source:
                if source is not None:
                    original = plain_model(source)
                    with evaluating(original):
                        predicted["before"].append(run(original, samples).argmax(1).cpu())
    if not labels:
        raise PrototypeError("The data has no batch. Accuracies need at least one.")

    names = class_names(plain, logits.shape[1])
    found = torch.cat(labels)
    if found.max() >= len(names):
        highest = int(found.max())
        raise PrototypeError(
            f"A sample has the label {highest}, and the model has {len(names)} classes. Pass data of these "
            "classes."
        )
    shares = {when: _shares(found, torch.cat(parts), names) for when, parts in predicted.items() if parts}
    forgotten = [] if erasure is None else erasure.concepts
    classes = []
    for number, count in enumerate(torch.bincount(found[found >= 0], minlength=len(names)).tolist()):
        if count:
            name, became = names[number], shares["after"][number]
            was = shares["before"][number] if "before" in shares else {}
            before = was.get(name, 0.0) if was else None
            after = became.get(name, 0.0)
            classes.append(ClassAccuracy(name, name in forgotten, count, before, after, was, became))
    return Accuracies(tuple(classes))


def _shares(labels: Tensor, predicted: Tensor, names: Sequence[str]) -> dict[int, dict[str, float]]:
    """Of each class that has samples, the percentage of them by predicted class, the largest first."""
    counted = labels >= 0
    labels, predicted = labels[counted], predicted[counted]
    totals = torch.bincount(labels).tolist()
    pairs, counts = torch.stack([labels, predicted]).unique(dim=1, return_counts=True)
    shares: dict[int, dict[str, float]] = {}
    for place in counts.argsort(descending=True, stable=True).tolist():
        label, given = pairs[:, place].tolist()
        shares.setdefault(label, {})[names[given]] = 100 * int(counts[place]) / totals[label]
    return shares


def note(model: nn.Module, found: Accuracies, measured_on: str) -> None:
    """
    Write what `more_hf.compare` measured, with the original at hand, into the facts of a model's erasure: its
    report, record and card have it then. The model itself is not changed. `measured_on` are the samples in
    words: "the 10,000 images of CIFAR-10's test set".

    Raises:
        `MoreError`: nothing was erased, or nothing is known of the original.
    """
    erasure = get_erasure(model)
    if erasure is None or any(one.before is None for one in found.classes):
        raise MoreError(
            f"This {type(model).__name__} was not erased here, or the accuracies lack those of the original. "
            "Pass an erased model and what `more_hf.compare(model, data, original=...)` returns."
        )
    became = {one.name: dict(list(one.became.items())[:TAKERS]) for one in found.classes if one.forgotten}
    facts = {"accuracy": found.to_facts(), "became": became, "measured_on": measured_on}
    erasure.facts = replace(erasure.facts, **facts)
