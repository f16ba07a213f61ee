"""The one forward pre-hook that routes: which expert the prompt's features go through before the denoiser reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import hook
from ..core.erasure import Erasure
from ..core.remap import Remap
from .sites import Denoiser


class RoutingHook(hook.RoutingHook):
    """The one forward pre-hook of a denoiser: `encoder_hidden_states` `(batch, tokens, d)` becomes E_e z.

    A pooled feature `(batch, d')`, at the place `where` among the arguments, goes through the same expert of its own space.
    """

    def __init__(
        self,
        remap: Remap | None = None,
        router: str | None = None,
        device: torch.device | str = "cpu",
        pooled: Remap | None = None,
        where: tuple[str, ...] = (),
        arguments: tuple[str, ...] = (),
    ):
        super().__init__(remap, router, device)
        self.arguments = arguments  # of the denoiser's `forward`, for those that are given by position
        self.pooled = None if pooled is None else hook.RoutingHook(pooled, router, device)
        self.where = where

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.enabled:
            return None
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        experts = self.experts(kwargs["encoder_hidden_states"])
        kwargs["encoder_hidden_states"] = self.route(kwargs["encoder_hidden_states"], experts)
        if self.pooled is not None:
            kwargs = _replaced(kwargs, self.where, lambda z: self.pooled.route(z, experts))
        return (), kwargs


def _replaced(values: Mapping[str, Any], where: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The mapping with the value at one place changed; mappings on the way are copied, not written to."""
    name, *inner = where
    return {**values, name: _replaced(values[name], inner, change) if inner else change(values[name])}


def make_hook(denoiser: Denoiser, erasure: Erasure, device: torch.device) -> RoutingHook:
    """The hook of an erasure that has a router and factors."""
    pooled = next(iter(erasure.remaps.values()), None)
    arguments = tuple(inspect.signature(type(denoiser.module).forward).parameters)[1:]
    return RoutingHook(erasure.remap, erasure.router, device, pooled, denoiser.family.pooled, arguments)


def attach_hook(denoiser: nn.Module, erasure: Erasure) -> None:
    """Put the erasure's hook, if it has one, before every other hook of the denoiser."""
    if erasure.hook is not None:
        erasure.handle = denoiser.register_forward_pre_hook(erasure.hook, with_kwargs=True, prepend=True)
        hook.reset_compiled()
