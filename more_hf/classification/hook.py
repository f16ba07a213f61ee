"""The pre-hook of a classifier's head (or of an inner module): the feature that it reads is routed first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core import hook
from ..core.erasure import Erasure
from ..core.remap import Remap


def channel_dim(module: nn.Module, z: Tensor) -> int:
    """Where a feature's d channels are: at 1 in a feature map `(batch, d, height, width)`, else last."""
    return 1 if z.ndim == 4 and not isinstance(module, nn.Linear | nn.LayerNorm) else -1


class HeadHook(hook.RoutingHook):
    """A feature `(batch, d)`, tokens `(batch, ..., d)` or a feature map `(batch, d, height, width)` becomes E_e z.

    The router sees the sample's mean feature. With several heads the first one's hook decides for all: experts that differ from head
    to head would leave the feature recoverable.
    """

    def __init__(
        self,
        remap: Remap | None = None,
        router: str | None = None,
        device: torch.device | str = "cpu",
        first: HeadHook | None = None,
    ):
        super().__init__(remap, router, device)
        self.first = first
        self.taken: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if not (self.enabled if self.first is None else self.first.enabled):
            return None
        dim = channel_dim(module, args[0])
        return (self.route(args[0].movedim(dim, -1)).movedim(-1, dim), *args[1:])

    def experts(self, z: Tensor) -> Tensor:
        if self.first is not None:
            return self.first.taken.to(z.device)
        self.taken = super().experts(z.reshape(len(z), -1, z.shape[-1]).mean(1))
        return self.taken


class _Handles(list):
    def remove(self) -> None:
        for handle in self:
            handle.remove()


def attach_hooks(model: nn.Module, modules: Mapping[str, nn.Module], erasure: Erasure) -> None:
    """Put a hook before every other hook of each module; the first of them, which has the router, is the erasure's."""
    device = next(model.parameters()).device
    erasure.handle, erasure.hook = _Handles(), None
    for name, module in modules.items():
        routing = HeadHook(erasure.remap_of(name), erasure.router, "cpu" if device.type == "meta" else device, erasure.hook)
        erasure.hook = erasure.hook or routing
        erasure.handle.append(module.register_forward_pre_hook(routing, prepend=True))
    hook.reset_compiled()
