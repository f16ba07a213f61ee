"""The one transaction that erases, re-erases or restores a model: it completes, or the model is unchanged.

Its order makes an interruption at any point harmless: originals are registered before the first weight
changes and stay registered until the last one is back, and any failure in between puts back weights, hooks
and record. A quantized layer is plain while it is edited, and quantized as it was when it is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import registry
from .erasure import Erasure
from .errors import IncompatibleBaseError, MoreError
from .hook import attach_hooks, detach_hooks
from .interrupts import unless_completed
from .site import Site, copy_weights, put_in_place, write_weights
from .views import is_shown


def install(
    model: nn.Module,
    erasure: Erasure,
    modules: Sequence[nn.Module],
    prove: Callable[[Mapping[str, Tensor]], dict[str, float]],
    *,
    keep_originals: bool,
) -> None:
    """
    Merge the mean expert into every site, attach the hooks, prove by a run, and register the erasure.

    Args:
        model (`nn.Module`):
            The denoiser or classifier; changed in place.
        erasure (`Erasure`):
            The edit, with the originals. It replaces an earlier erasure of the model.
        modules (`Sequence[nn.Module]`):
            The module of each hook, whether there are hooks or not.
        prove (`Callable`):
            Takes the edited weights, runs the edited model and returns its measurements; raises if the edit
            does not hold.
        keep_originals (`bool`):
            Whether to keep the originals in memory afterwards.

    Raises:
        `IncompatibleBaseError`: an edited weight is not finite in the model's dtype. `MoreError`: the call is
        inside a block that shows the original. Also whatever `prove` raises. The model is then unchanged.
    """
    current = registry.find_erasure(model)
    refuse_inside_block(current)
    edited = edited_weights(erasure)
    earlier = {} if current is None else current.sites
    left = {name: site for name, site in earlier.items() if name not in erasure.sites}
    touched = {**left, **erasure.sites}
    before = copy_weights(touched)
    in_place = {name: site.is_in_place for name, site in touched.items()}

    def undo() -> None:
        put_in_place(touched, in_place)
        write_weights(touched, before)
        detach_hooks(erasure.hooks)
        if current is not None:
            attach_hooks(current.hooks, modules)
        registry.register(model, current)

    with unless_completed(undo):
        registry.register(model, erasure)
        put_in_place(erasure.sites)
        write_weights(erasure.sites, edited)
        if left:
            write_weights(left, current.require_originals())
            put_in_place(left, False)
        if current is not None:
            detach_hooks(current.hooks)
        attach_hooks(erasure.hooks, modules)
        erasure.proof = prove(edited)
        if not keep_originals:
            erasure.originals = None
    if not keep_originals:  # now that nothing is undone any more
        for site in erasure.sites.values():
            site.quantized = None


def uninstall(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """
    Write the originals back, bit for bit, detach the hooks, and forget the erasure. Mutates the model.
    """
    erasure = registry.find_erasure(model)
    refuse_inside_block(erasure)
    before = copy_weights(erasure.sites)

    def undo() -> None:
        registry.register(model, erasure)
        put_in_place(erasure.sites)
        write_weights(erasure.sites, before)
        attach_hooks(erasure.hooks, modules)

    with unless_completed(undo):
        detach_hooks(erasure.hooks)
        write_weights(erasure.sites, erasure.require_originals())
        put_in_place(erasure.sites, False)
        registry.register(model, None)


def refuse_inside_block(erasure: Erasure | None) -> None:
    """
    Raises `MoreError` while a block shows the original, in this thread or another.

    A run could not prove what the weights do then, and the block would see a mixture of both models.
    """
    if erasure is not None and is_shown(erasure):
        raise MoreError(
            "`more_hf.disabled` shows the original of this model. Leave the block, then erase or restore."
        )


def edited_weights(erasure: Erasure) -> dict[str, Tensor]:
    """
    The weight of every site with the mean expert merged, in its dtype and on its device.

    Raises:
        `IncompatibleBaseError`: an edited weight is not finite in its dtype.
    """
    return {name: _edited(erasure, name, site) for name, site in erasure.sites.items()}


def _edited(erasure: Erasure, name: str, site: Site) -> Tensor:
    weight = site.read()
    edited = erasure.remap_of(name).merged(erasure.originals[name].to(weight.device)).to(weight.dtype)
    if not torch.isfinite(edited).all():
        raise IncompatibleBaseError(
            f"The edited weight of `{name}` is not finite in {edited.dtype}. Nothing was changed. "
            "Load the model in a wider dtype."
        )
    return edited
