"""The names of a classifier's classes, and the class that a user means."""

from __future__ import annotations

from collections.abc import Sequence, Set
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..core.errors import PrototypeError, shown
from .names import unique_names


def class_names(model: nn.Module, num_classes: int) -> tuple[str, ...]:
    """
    A unique name for each class: its label in `model.config.id2label`, or its number in a model without
    labels.

    Where two classes share a label ("crane" in ImageNet) the number is added.
    """
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    return unique_names([str(labels.get(i, i)) for i in range(num_classes)])


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
