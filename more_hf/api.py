"""The verbs that work on everything erased: a pipeline or a classifier. The one place that tells them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from .core.erasure import Erasure
from .core.errors import MoreError
from .core.hook import hook_off


def _family(model: Any):
    """The module with `restore` and `get_erasure` for this kind of model."""
    return import_module(".classification.erase" if isinstance(model, nn.Module) else ".diffusion.erase", __package__)


def restore(model: Any, concepts: str | int | Sequence[str | int] | None = None) -> Any:
    """Undo an erasure in place and return the pipeline or classifier: all of it bit for bit, or some concepts or classes (the others
    are fitted again).

    Raises `MoreError` if nothing was erased or a concept was not, `AlreadyErasedError` without originals, and
    `IncompatibleBaseError` if the edited layers were changed since (a LoRA fused, training).
    """
    return _family(model).restore(model, concepts)


def get_erasure(model: Any) -> Erasure | None:
    """What was erased from a pipeline or classifier and how, or `None`. The object is the live record; do not change it.

    It knows what was done in this process, or opened by `more_hf.load`. Plain `from_pretrained` reads no record and gives `None` for an
    erased model, too; to erase from it again is refused where the record lies in the folder that it was opened from.
    """
    return _family(model).get_erasure(model)


@contextmanager
def disabled(model: Any) -> Iterator[Any]:
    """The original inside the `with` block, the erased one again after it. Raises `MoreError` if nothing was erased."""
    erasure = get_erasure(model)
    if erasure is None:
        raise MoreError(f"Nothing was erased from this {type(model).__name__}, so there is nothing to disable.")
    with hook_off(erasure), erasure.original_weights():
        yield model


@contextmanager
def routing(model: Any, seeds: Sequence[int]) -> Iterator[Any]:
    """Give every sample of the calls inside its own stream of experts: expert = function of its seed and the call's index.

    `seeds` has one integer per image of the batch; the halves of classifier-free guidance share them. What comes out then does not
    depend on batch size or process. Raises `MoreError` if there is no router.
    """
    erasure = get_erasure(model)
    if erasure is None or erasure.router is None or erasure.hook is None:
        raise MoreError(f'This {type(model).__name__} has no router. Erase with router="random" or router="hash" first.')
    if not seeds:
        raise MoreError("`seeds` is empty. Pass one integer per image of the batch.")
    erasure.hook.router.reset(seeds)
    try:
        yield model
    finally:
        erasure.hook.router.reset(None)
