"""The names of a classifier's classes, and the class that a user means."""

from __future__ import annotations

from numbers import Integral
from typing import Any

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
    One class, several (a tensor, too), or `None` for none, as a list of names and numbers.

    Raises:
        `PrototypeError`: something is neither text nor a whole number: a mask, for instance.
    """
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.tolist()
    classes = [value] if isinstance(value, str | Integral) else list(value)
    for wanted in classes:
        if not isinstance(wanted, str | Integral) or isinstance(wanted, bool):
            raise PrototypeError(
                f"`{argument}` must hold names or whole numbers of classes, got {shown(wanted)}. Of a mask "
                "pass `mask.nonzero()`."
            )
    return classes
