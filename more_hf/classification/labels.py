"""The names of a classifier's classes, and the class that a user means."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence, Set
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..core.errors import PrototypeError, shown


def class_names(model: nn.Module, num_classes: int) -> tuple[str, ...]:
    """
    A unique name for each class: its label in `model.config.id2label`, or its number in a model without
    labels.

    Where two classes share a label ("crane" in ImageNet) the number is added.
    """
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(labels.get(i, i)) for i in range(num_classes)]
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} (class {i})" for i, name in enumerate(names))


def read_classes(argument: str, value: Any) -> list[str | int]:
    """
    One class, several, or `None` for none, as a list of names and numbers; tensors and arrays of numbers are
    lists, too.

    Raises:
        `PrototypeError`: something is neither text nor a whole number: a mask, for instance, which names no
        classes.
    """
    if isinstance(value, Tensor | np.ndarray):
        value = value.reshape(-1).tolist()
    if value is None:
        return []
    if isinstance(value, str | Integral):
        value = [value]
    if not isinstance(value, Sequence | Set) or isinstance(value, bytes | bytearray):
        raise PrototypeError(f"`{argument}` must be a class or a list of classes, got {shown(value)}.")
    classes = [wanted.tolist() if isinstance(wanted, Tensor | np.generic) else wanted for wanted in value]
    for wanted in classes:
        if not isinstance(wanted, str | Integral) or isinstance(wanted, bool):
            raise PrototypeError(
                f"`{argument}` must hold names or whole numbers of classes, got {shown(wanted)}. Of a mask "
                "pass `mask.nonzero()`, of floats `.long()`."
            )
    return classes


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
                f"There is no class {shown(wanted)}: the model has the {len(names)} classes 0 to "
                f"{len(names) - 1}."
            )
        return names[wanted]
    if wanted in names:
        return wanted
    if (
        wanted.isdecimal() and len(wanted) < 20
    ):  # no class has a longer number, and Python reads none of 5,000 digits
        return find_class(names, int(wanted))

    # by its label without the number, or by one of the synonyms in it
    matches = []
    for i, name in enumerate(names):
        label = name.removesuffix(f" (class {i})").casefold()
        synonyms = [part.strip() for part in label.split(",")]
        if wanted.casefold() in (label, *synonyms):
            matches.append(i)
    if len(matches) == 1:
        return names[matches[0]]
    if matches:
        found = ", ".join(f"{i} ({names[i]})" for i in matches)
        raise PrototypeError(f"{shown(wanted)} names {len(matches)} classes: {found}. Pass the number.")
    close = difflib.get_close_matches(wanted, names, n=3)
    hint = (
        f"Did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"It has {', '.join(map(repr, names[:10]))}."
    )
    raise PrototypeError(f"The model has no class {shown(wanted)}. {hint}")
