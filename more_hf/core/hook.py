"""What every routing hook has in common: the route of a feature, and how a hook is put on, taken off and silenced."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .erasure import Erasure
from .remap import Remap
from .routers import ROUTERS


logger = logging.getLogger(__name__)


class RoutingHook:
    """A forward pre-hook: a feature z becomes E_e z, with the expert that the router picks for each sample.

    On weights that hold the mean expert the result is exactly expert e's, since E_mean E_e = E_e. Without a router every sample
    takes the mean expert. Pickled or deep-copied it leaves its factors out and does nothing: the copy keeps what is in its weights.
    """

    def __init__(self, remap: Remap | None = None, router: str | None = None, device: torch.device | str = "cpu"):
        self.enabled = remap is not None
        self.forced: Tensor | None = None
        if remap is not None:
            self.router = None if router is None else ROUTERS[router](remap, device)
            self.read = remap.D_F.T.float().to(device)  # (d, f)
            shifts = remap.shift()[None] if router is None else remap.shifts
            self.shifts = shifts.transpose(1, 2).float().contiguous().to(device)  # (num_experts, f, d)

    def experts(self, z: Tensor) -> Tensor:
        """Which expert each of the samples `(batch, ..., d)` takes, `(batch,)` int64."""
        if self.forced is not None:
            return self.forced.to(z.device)
        return torch.zeros(len(z), dtype=torch.int64, device=z.device) if self.router is None else self.router(z)

    def route(self, z: Tensor, experts: Tensor | None = None) -> Tensor:
        """E z for `(batch, ..., d)`, in float32, returned in the dtype of z; by the router's experts unless others are given."""
        experts = self.experts(z) if experts is None else experts
        shifts = self.shifts.to(z.device)[experts.to(z.device)]  # (batch, f, d)
        tokens = z.float().reshape(len(z), -1, z.shape[-1])
        return (tokens + tokens @ self.read.to(z.device) @ shifts).reshape(z.shape).to(z.dtype)

    def __reduce__(self) -> tuple:
        logger.warning("A routing hook is copied without its factors: the copy keeps the mean expert, which is in the weights.")
        return type(self), ()


def detach_hook(erasure: Erasure) -> None:
    if erasure.handle is not None:
        erasure.handle.remove()
        reset_compiled()


@contextmanager
def hook_off(erasure: Erasure) -> Iterator[None]:
    """The erasure's hook, if it has one, does nothing inside the block."""
    if erasure.hook is None:
        yield
        return
    erasure.hook.enabled = False
    reset_compiled()
    try:
        yield
    finally:
        erasure.hook.enabled = True
        reset_compiled()


def reset_compiled() -> None:
    """torch does not guard module hooks: compiled code would go on with the old ones."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
