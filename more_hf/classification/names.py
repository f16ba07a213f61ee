"""A classifier's class names, and which of them a user means; without torch, so that `more-hf` can ask."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..core.errors import PrototypeError, shown


if TYPE_CHECKING:
    from torch import nn


def class_names(model: nn.Module, num_classes: int) -> tuple[str, ...]:
    """
    The unique names of a model's classes: the labels in its configuration, or in a timm model's own, or else
    numbers.
    """
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    own = getattr(model, "pretrained_cfg", None) or {}
    labels = labels or dict(enumerate(own.get("label_names") or ()))
    return unique_names([str(labels.get(i, i)) for i in range(num_classes)])


def unique_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels by class number, with the number where two classes share a label ("crane" in ImageNet)."""
    counts = Counter(labels)
    return tuple(label if counts[label] == 1 else f"{label} (class {i})" for i, label in enumerate(labels))


def find_classes(names: Sequence[str], argument: str, value: Any) -> list[str]:
    """
    The names of one class, several (a tensor or an array, too), or `None` for none.

    Raises:
        `PrototypeError`: as from `find_class`, or something is neither text nor a whole number: a mask, for
        instance.
    """
    if value is None:
        return []
    if hasattr(value, "tolist"):
        value = value.tolist()
    classes = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    for wanted in classes:
        if not isinstance(wanted, str | Integral) or isinstance(wanted, bool):
            raise PrototypeError(
                f"`{argument}` must hold names or whole numbers of classes, got {shown(wanted)}. Of a mask "
                "pass `mask.nonzero()`."
            )
    return [find_class(names, wanted) for wanted in classes]


def find_class(names: Sequence[str], wanted: str | int) -> str:
    """
    The name of a class given by number, by name, or by one of its synonyms ("tench" for "tench, Tinca
    tinca").

    Raises:
        `PrototypeError`: the number is too large, or no class or more than one class has the name.
    """
    if isinstance(wanted, Integral):
        if not 0 <= wanted < len(names):
            raise PrototypeError(
                f"There is no class {shown(wanted)}. Choose one of the model's {len(names)} classes, 0 to "
                f"{len(names) - 1}."
            )
        return names[wanted]
    if wanted in names:
        return wanted
    if wanted.isdecimal():
        return find_class(names, int(wanted))

    # by its label without the number, or by one of the synonyms in it
    spellings: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        label = _spelled(name.removesuffix(f" (class {i})"))
        for spelling in dict.fromkeys([label, *label.split(", ")]):
            spellings.setdefault(spelling, []).append(i)
    matches = spellings.get(_spelled(wanted), [])
    if len(matches) == 1:
        return names[matches[0]]
    if matches:
        found = ", ".join(f"{i} ({names[i]})" for i in matches)
        raise PrototypeError(f"{shown(wanted)} names {len(matches)} classes: {found}. Pass the number.")
    close = difflib.get_close_matches(_spelled(wanted), spellings, n=3)
    nearest = dict.fromkeys(names[i] for spelling in close for i in spellings[spelling])
    hint = (
        f"Did you mean {' or '.join(map(repr, nearest))}?"
        if nearest
        else f"It has {', '.join(map(repr, names[:10]))}."
    )
    raise PrototypeError(f"The model has no class {shown(wanted)}. {hint}")


def _spelled(label: str) -> str:
    """A label as it is compared: without regard to case and to spaces around its synonyms."""
    return ", ".join(" ".join(part.split()) for part in label.casefold().split(","))
