"""What one calling context sees of an erased model: the original, or the weights without the routing hook.

Neither writes to a parameter or takes a hook off, so that a save, another thread or a crash meets the erased model.
The original's output is computed beside the erased weights by a forward hook on every edited layer. It acts for
contexts that asked for it (`contextvars`; a new thread starts with none) and is gone after the last block. While a
block is open, compiled models run eagerly: their code was traced without these hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .erasure import Erasure
from .site import Site


# What the context sees, by `id` of the erasure, which the block that set it keeps alive.
_originals: ContextVar[frozenset[int]] = ContextVar("more_hf_originals", default=frozenset())
_unrouted: ContextVar[frozenset[int]] = ContextVar("more_hf_unrouted", default=frozenset())
_experts: ContextVar[tuple[int, Tensor] | None] = ContextVar("more_hf_experts", default=None)


@contextmanager
def original_shown(erasure: Erasure) -> Iterator[None]:
    """Inside the block this context sees the original model. Raises `AlreadyErasedError` without the originals."""
    originals = erasure.require_originals() if erasure.sites else {}
    with _block(erasure, originals, _originals, _originals.get() | {id(erasure)}):
        yield


@contextmanager
def routing_off(erasure: Erasure) -> Iterator[None]:
    """Inside the block this context sees the weights alone: the erasure's hooks, if it has any, do nothing."""
    with _block(erasure, {}, _unrouted, _unrouted.get() | {id(erasure)}):
        yield


@contextmanager
def experts_forced(erasure: Erasure, experts: Tensor) -> Iterator[None]:
    """Inside the block every sample `(batch,)` of this context's calls takes the given expert, int64."""
    with _block(erasure, {}, _experts, (id(erasure), experts)):
        yield


def sees_original(erasure: Erasure) -> bool:
    """Whether the calling context is in a block that shows the original."""
    return id(erasure) in _originals.get()


def is_unrouted(key: int) -> bool:
    """Whether the hooks of this erasure do nothing in the calling context."""
    return open_blocks.any and (key in _unrouted.get() or key in _originals.get())


def forced_experts(key: int) -> Tensor | None:
    """The experts that the calling context's samples must take, if it says so."""
    forced = _experts.get() if open_blocks.any else None
    return forced[1] if forced is not None and forced[0] == key else None


@contextmanager
def _block(erasure: Erasure, originals: dict[str, Tensor], variable: ContextVar, value: Any) -> Iterator[None]:
    try:
        open_blocks.enter(erasure, originals)
        token = variable.set(value)
        try:
            yield
        finally:
            variable.reset(token)
    finally:
        open_blocks.leave(erasure)


class OriginalOutput:
    """A forward hook of an edited layer: the original's output for contexts that see the original."""

    def __init__(self, key: int, site: Site, original: Tensor):
        self.key, self.site = key, site
        self.original = original if site.columns is None else site.with_part(original)
        self.weights: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.key not in _originals.get():
            return None
        # Where the weight is now: an offloaded layer is back on the CPU, and the model may have been cast.
        place = output.device, module.weight.dtype
        if place not in self.weights:
            self.weights[place] = self.original.to(*place)
        bias = self.site.read_bias()
        return linear(args[0].to(output.device), self.weights[place], None if bias is None else bias.to(*place))


class _OpenBlocks:
    """The forward hooks of open blocks, by erasure, and the compiler's stance while there are any."""

    def __init__(self) -> None:
        self.any = False  # what compiled code looks at, instead of context variables
        self.lock = Lock()
        self.count: dict[int, int] = {}
        self.hooks: dict[int, ExitStack] = {}
        self.eager = ExitStack()

    def enter(self, erasure: Erasure, originals: dict[str, Tensor]) -> None:
        key = id(erasure)
        with self.lock:
            if not self.any:
                self.eager.enter_context(torch.compiler.set_stance("force_eager"))
            self.count[key] = self.count.get(key, 0) + 1
            self.any = True
            if originals and key not in self.hooks:
                self.hooks[key] = ExitStack()
                for name, original in originals.items():
                    site = erasure.sites[name]
                    handle = site.module.register_forward_hook(OriginalOutput(key, site, original))
                    self.hooks[key].callback(handle.remove)

    def leave(self, erasure: Erasure) -> None:
        key = id(erasure)
        with self.lock:
            self.count[key] = self.count.get(key, 1) - 1
            if not self.count[key]:
                del self.count[key]
                self.hooks.pop(key, ExitStack()).close()
            if not self.count:
                self.any = False
                self.eager.close()


open_blocks = _OpenBlocks()
