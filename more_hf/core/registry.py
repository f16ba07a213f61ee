"""
The registry of erased models. It lives outside them, so pickling, copying or saving never carries it along.

Models that are edited as one come in an `nn.ModuleDict`, which may be a new object at every call; the erasure
is therefore registered for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from weakref import WeakKeyDictionary

from torch import nn

from .erasure import Erasure
from .errors import AlreadyErasedError, MoreError
from .interrupts import held, unwound


# A plain attribute of the model with the erased names, which a deep copy or an unpickled model still has.
ERASED = "more_hf_erased"

_erasures: WeakKeyDictionary[nn.Module, Erasure] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_registry_lock = RLock()


@contextmanager
def locked(model: nn.Module) -> Iterator[None]:
    """Hold the model's lock, as an erasure or restoration does from its first check to its last write."""
    with held(_registry_lock):
        # Always in the same order, since another pipeline may list the same models the other way round.
        locks = [_locks.setdefault(part, RLock()) for part in sorted(_parts_of(model), key=id)]
    with unwound() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield


def _parts_of(model: nn.Module) -> list[nn.Module]:
    return list(model.values()) if isinstance(model, nn.ModuleDict) else [model]


def find_erasure(model: nn.Module) -> Erasure | None:
    """The erasure of a denoiser or classifier, or `None`."""
    # all parts have the same erasure, so the first that has one will do
    for part in _parts_of(model):
        if part in _erasures:
            return _erasures[part]
    return None


def register(model: nn.Module, erasure: Erasure | None) -> None:
    """Remember what was done to the model, or forget it with `None`."""
    for part in _parts_of(model):
        if erasure is None:
            _erasures.pop(part, None)
            part.__dict__.pop(ERASED, None)
        else:
            _erasures[part] = erasure
            setattr(part, ERASED, tuple(erasure.concepts))


def require_editable(model: nn.Module) -> Erasure | None:
    """
    The model's erasure if it can be fitted again, `None` if it has none.

    Raises:
        `AlreadyErasedError`: the model was erased and its originals are not available.
        `IncompatibleBaseError`: the edited layers have changed since the edit.
    """
    erasure = find_erasure(model)
    names = {name: None for part in _parts_of(model) for name in part.__dict__.get(ERASED, ())}
    if erasure is None and names:
        raise AlreadyErasedError(
            f"This is a copy of a model from which {', '.join(map(repr, names))} was erased; copies carry no "
            "original weights. Call on the model it was copied from, or start from the original and pass "
            "all concepts at once."
        )
    if erasure is not None:
        erasure.check_unchanged()
    return erasure


def require_erased(model: nn.Module) -> Erasure:
    """The erasure to restore. Raises as `require_editable` does, and `MoreError` if there is none."""
    erasure = require_editable(model)
    if erasure is None:
        raise MoreError(
            f"Nothing was erased from this {type(model).__name__}, so there is nothing to restore. Call on "
            "the pipeline or classifier from which something was erased."
        )
    return erasure


def check_restorable(erasure: Erasure, names: Sequence[str]) -> None:
    """Raises `MoreError` if nothing is named, or something that was not erased."""
    if not names:
        raise MoreError("Nothing is named. Name what to restore, or leave it out to restore everything.")
    if unknown := [name for name in names if name not in erasure.concepts]:
        erased = ", ".join(map(repr, erasure.concepts))
        raise MoreError(f"{', '.join(map(repr, unknown))} was not erased here. Erased: {erased}.")
