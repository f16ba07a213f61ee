"""
The forward pre-hook that routes: which expert the prompt's features go through before the denoiser reads
them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.erasure import Erasure
from ..core.hook import RoutingHook
from ..core.remap import Remap
from .sites import Denoiser


class PromptHook(RoutingHook):
    """
    The pre-hook of a denoiser: `encoder_hidden_states` `(batch, tokens, d)` becomes E_e z.

    A pooled feature `(batch, d')`, at the place `where` among the arguments, goes through the same expert of
    its own space. `arguments` are the names of `forward`'s parameters, for those that are given by position.
    """

    with_kwargs = True

    def __init__(
        self,
        remap: Remap | None = None,
        router: str | None = None,
        device: torch.device | str = "cpu",
        key: int = 0,
        pooled: Remap | None = None,
        where: tuple[str, ...] = (),
        arguments: tuple[str, ...] = (),
    ):
        super().__init__(remap, router, device, key)
        self.arguments = arguments
        self.pooled = None if pooled is None else RoutingHook(pooled, router, device, key)
        self.where = where

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.acts:
            return None
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        experts = self.experts(kwargs["encoder_hidden_states"])
        kwargs["encoder_hidden_states"] = self.route(kwargs["encoder_hidden_states"], experts)
        if self.pooled is not None:
            kwargs = _replaced(kwargs, self.where, lambda z: self.pooled.route(z, experts))
        return (), kwargs


def _replaced(
    values: Mapping[str, Any], where: tuple[str, ...], change: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The mapping with the value at one place changed; mappings on the way are copied, not written to."""
    name, *inner = where
    value = _replaced(values[name], tuple(inner), change) if inner else change(values[name])
    return {**values, name: value}


def make_hooks(denoiser: Denoiser, erasure: Erasure, device: torch.device) -> tuple[PromptHook, ...]:
    """The denoiser's hook, if the erasure has a router and factors."""
    if erasure.router is None or not erasure.remaps:
        return ()
    arguments = tuple(inspect.signature(type(denoiser.module).forward).parameters)[1:]
    hook = PromptHook(
        erasure.remap,
        erasure.router,
        device,
        id(erasure),
        pooled=erasure.remaps.get("pooled"),
        where=denoiser.family.pooled,
        arguments=arguments,
    )
    return (hook,)
