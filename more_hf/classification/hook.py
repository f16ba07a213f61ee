"""The pre-hook of a classifier's head (or of an inner module): the feature that it reads is routed first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.erasure import Erasure
from ..core.hook import RoutingHook


def channel_dim(module: nn.Module, z: Tensor) -> int:
    """Where a feature's d channels are: at 1 in a feature map `(batch, d, height, width)`, else last."""
    return 1 if z.ndim == 4 and not isinstance(module, nn.Linear | nn.LayerNorm) else -1


class HeadHook(RoutingHook):
    """
    A feature `(batch, d)`, tokens `(batch, ..., d)` or a feature map `(batch, d, height, width)` becomes E_e
    z.

    The router sees the sample's mean feature. With several heads the `first` one's hook decides for all:
    experts that differ from head to head would leave the feature recoverable. What comes first is what
    `RoutingHook` takes.
    """

    def __init__(self, *factors: Any, first: HeadHook | None = None):
        super().__init__(*factors)
        self.first = first
        self.taken: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if not self.acts:
            return None
        dim = channel_dim(module, args[0])
        return (self.route(args[0].movedim(dim, -1)).movedim(-1, dim), *args[1:])

    def experts(self, z: Tensor) -> Tensor:
        """See `RoutingHook.experts`."""
        if self.first is not None:
            return self.first.taken.to(z.device)
        self.taken = super().experts(z.reshape(len(z), -1, z.shape[-1]).mean(1))
        return self.taken


def make_hooks(erasure: Erasure, names: Iterable[str], device: torch.device) -> tuple[HeadHook, ...]:
    """A hook for each module, whose names are the erasure's spaces; the first one has the router."""
    hooks: list[HeadHook] = []
    where = "cpu" if device.type == "meta" else device
    for name in names:
        first = hooks[0] if hooks else None
        hooks.append(HeadHook(erasure.remaps[name], erasure.router, where, id(erasure), first=first))
    return tuple(hooks)
