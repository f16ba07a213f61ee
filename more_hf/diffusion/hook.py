"""The one forward pre-hook that routes: which expert the prompt's features go through before the denoiser reads them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..erasure import Erasure
from ..remap import Remap
from ..routers import ROUTERS


logger = logging.getLogger(__name__)


class RoutingHook:
    """The one forward pre-hook: `encoder_hidden_states` becomes E_e z, with the expert that the router picks for each sample.

    On weights that hold the mean expert the result is exactly expert e's, since E_mean E_e = E_e. Pickled or deep-copied it leaves
    its factors out and does nothing: the copy keeps the mean expert, which is in its weights.
    """

    def __init__(self, remap: Remap | None = None, router: str | None = None, device: torch.device | str = "cpu"):
        self.enabled = remap is not None
        self.forced: Tensor | None = None
        if remap is not None:
            self.router = ROUTERS[router](remap, device)
            self.read = remap.D_F.T.float().to(device)  # (d, f)
            self.shifts = remap.shifts.transpose(1, 2).float().contiguous().to(device)  # (num_experts, f, d)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.enabled:
            return None
        if "encoder_hidden_states" in kwargs:
            return args, {**kwargs, "encoder_hidden_states": self.route(kwargs["encoder_hidden_states"])}
        return (*args[:2], self.route(args[2]), *args[3:]), kwargs

    def route(self, z: Tensor) -> Tensor:
        """E z for `(batch, tokens, d)`, in float32, returned in the dtype of z."""
        experts = self.router(z) if self.forced is None else self.forced
        read = z.float() @ self.read.to(z.device)
        return (z.float() + read @ self.shifts.to(z.device)[experts.to(z.device)]).to(z.dtype)

    def __reduce__(self) -> tuple:
        logger.warning("A routing hook is copied without its factors: the copy keeps the mean expert, which is in the weights.")
        return RoutingHook, ()


def attach_hook(denoiser: nn.Module, erasure: Erasure) -> None:
    """Put the erasure's hook, if it has one, before every other hook of the denoiser."""
    if erasure.hook is not None:
        erasure.handle = denoiser.register_forward_pre_hook(erasure.hook, with_kwargs=True, prepend=True)
        reset_compiled()


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
