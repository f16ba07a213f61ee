"""What a classifier's classes are called, and which one is meant."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from numbers import Integral

from torch import nn

from ..core.errors import PrototypeError


def class_names(model: nn.Module, num_classes: int) -> tuple[str, ...]:
    """A unique name for each of the classes: `model.config.id2label`, with the number where two classes share a label ("crane"
    in ImageNet), or the number alone for a model that has no labels."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(labels.get(i, i)) for i in range(num_classes)]
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} (class {i})" for i, name in enumerate(names))


def find_class(names: Sequence[str], wanted: str | int) -> str:
    """The name of a class given by number, by name, or by one of its synonyms ("tench" for "tench, Tinca tinca").

    Raises `PrototypeError` for a number that is too large, and for a name that no class or more than one class has.
    """
    if isinstance(wanted, Integral):
        if not 0 <= wanted < len(names):
            raise PrototypeError(f"There is no class {wanted}: the model has the {len(names)} classes 0 to {len(names) - 1}.")
        return names[wanted]
    if wanted in names:
        return wanted
    if wanted.isdecimal():
        return find_class(names, int(wanted))
    labels = [name.removesuffix(f" (class {i})").casefold() for i, name in enumerate(names)]
    synonyms = [{label, *(part.strip() for part in label.split(","))} for label in labels]
    matches = [i for i, parts in enumerate(synonyms) if wanted.casefold() in parts]
    if len(matches) == 1:
        return names[matches[0]]
    if matches:
        found = ", ".join(f"{i} ({names[i]})" for i in matches)
        raise PrototypeError(f"{wanted!r} names {len(matches)} classes: {found}. Pass the number.")
    close = difflib.get_close_matches(wanted, names, n=3)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"It has {', '.join(map(repr, names[:10]))}."
    raise PrototypeError(f"The model has no class {wanted!r}. {hint}")
