"""The base of every routing hook: how a feature is routed, and how the hook is attached and detached."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .remap import Remap
from .routers import ROUTERS
from .views import forced_experts, is_unrouted


logger = logging.getLogger(__name__)


class RoutingHook:
    """
    A forward pre-hook that turns a feature z into E_e z, with the expert e that the router picks per sample.

    On weights that hold the mean expert, the result is exactly expert e's, since E_mean E_e = E_e. Without a
    router, every sample takes the mean expert. Pickling or deep-copying drops the factors; the copy is a
    no-op, and the copied weights keep the mean expert.

    Args:
        remap (`Remap`, *optional*):
            The factors; without them the hook does nothing.
        router (`str`, *optional*):
            A name in `ROUTERS`.
        device (`torch.device`, *optional*):
            The device on which features will arrive.
        key (`int`, *optional*):
            The `id` of the erasure, by which `views` finds its blocks.
    """

    with_kwargs = False  # whether the module's keyword arguments are needed

    def __init__(
        self,
        remap: Remap | None = None,
        router: str | None = None,
        device: torch.device | str = "cpu",
        key: int = 0,
    ):
        self.enabled = remap is not None
        self.key = key
        self.handle = None
        if remap is not None:
            self.router = None if router is None else ROUTERS[router](remap, device)
            # Transposed for features as rows: E z becomes z + (z D_Fᵀ) (P_t − P_F)ᵀ.
            self.read = remap.D_F.T.float().to(device)  # (d, f)
            shifts = remap.shift()[None] if router is None else remap.shifts
            self.shifts = shifts.transpose(1, 2).float().contiguous().to(device)  # (num_experts, f, d)

    @property
    def acts(self) -> bool:
        """Whether the hook does anything in the calling context."""
        return self.enabled and not is_unrouted(self.key)

    def attach(self, module: nn.Module) -> None:
        """Attach the hook ahead of the module's other hooks, once."""
        self.detach()
        self.enabled = True
        self.handle = self.register(module)

    def register(self, module: nn.Module) -> RemovableHandle:
        """Register with torch, by the call for this kind of hook."""
        return module.register_forward_pre_hook(self, with_kwargs=self.with_kwargs, prepend=True)

    def detach(self) -> None:
        """Detach the hook, if it is attached."""
        self.enabled = False  # first, so that the hook does nothing even if an interruption comes next
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def experts(self, z: Tensor) -> Tensor:
        """The expert of each sample `(batch, ..., d)`, as `(batch,)` int64."""
        forced = forced_experts(self.key)
        if forced is not None:
            return forced.to(z.device)
        if self.router is None:
            return torch.zeros(len(z), dtype=torch.int64, device=z.device)
        return self.router(z)

    def route(self, z: Tensor, experts: Tensor | None = None) -> Tensor:
        """E z for `(batch, ..., d)`, in the dtype of z; experts that are not given are the router's."""
        experts = self.experts(z) if experts is None else experts
        # Offloading moves the model but not a hook, so the factors follow the features.
        shifts = self.shifts.to(z.device)[experts.to(z.device)]  # (batch, f, d)
        # in float32, since half precisions would round the shift away
        tokens = z.float().reshape(len(z), -1, z.shape[-1])
        return (tokens + tokens @ self.read.to(z.device) @ shifts).reshape(z.shape).to(z.dtype)

    def __reduce__(self) -> tuple:
        logger.warning(
            "A routing hook is copied without its factors: the copy keeps the mean expert in its weights."
        )
        return type(self), ()


def attach_hooks(hooks: Sequence[RoutingHook], modules: Sequence[nn.Module]) -> None:
    """Attach each hook, if there are any, to its module."""
    # strict=False, because an edit without a router has modules and no hooks
    for hook, module in zip(hooks, modules, strict=False):
        hook.attach(module)
    if hooks:
        reset_compiled()


def detach_hooks(hooks: Iterable[RoutingHook]) -> None:
    """Detach hooks from their modules."""
    for hook in hooks:
        hook.detach()
        reset_compiled()


def reset_compiled() -> None:
    """Drop compiled code: torch does not guard module hooks, so it would go on with the old ones."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
