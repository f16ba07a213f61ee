"""Views of an erased model: show one calling context the original, or the weights without the routing hook.

A view never writes to a parameter and never removes a hook, so a save, another thread or a crash always meets
the erased model. A forward hook on every edited layer computes the original's output next to the erased
weights. It acts only for the context that asked for it (`contextvars`; a new thread starts without any view)
and ends with its block. While a block is open, compiled models run eagerly: their code was traced without
these hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from threading import RLock

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .erasure import Erasure
from .interrupts import afterwards, held, unwound
from .site import Site, feature_dim


@dataclass(eq=False)
class _Block:
    """
    One open block.

    A context remembers its blocks, and a closed one no longer counts, whoever closed it: blocks may end in
    a different order than they began, and a copied context (an asyncio task) may outlive the block.
    """

    erasure: Erasure  # of the model that the block shows differently
    # shows the original; otherwise the weights, without the routing hook or with the given experts
    original: bool = False
    experts: Tensor | None = None  # the expert of every sample `(batch,)`, int64
    open: bool = True


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("more_hf_blocks", default=())


@contextmanager
def original_shown(erasure: Erasure) -> Iterator[None]:
    """Inside the block, this context sees the original. Raises `AlreadyErasedError` if it was not kept."""
    block = _Block(erasure, original=True)
    # An edit at an inner module has a hook and no sites, so there is nothing to give back but the hook.
    originals = erasure.require_originals() if erasure.sites else {}
    with unwound() as hooks, _entered(block):
        for name, site in erasure.sites.items():
            # ahead of the user's own hooks, so that they see and change the original's output
            hook = OriginalOutput(block, site, originals[name])
            hooks.callback(site.module.register_forward_hook(hook, prepend=True).remove)
        yield


@contextmanager
def routing_off(erasure: Erasure) -> Iterator[None]:
    """Inside the block, this context sees the weights alone: the erasure's hooks, if any, do nothing."""
    with _entered(_Block(erasure)):
        yield


@contextmanager
def experts_forced(erasure: Erasure, experts: Tensor) -> Iterator[None]:
    """Inside the block, each sample in this context's calls takes its given expert, `(batch,)` int64."""
    with _entered(_Block(erasure, experts=experts)):
        yield


def is_shown(erasure: Erasure) -> bool:
    """Whether any context is inside a block that shows the original."""
    # A copy of the holders, since another thread may enter or leave meanwhile.
    return any(block.open and block.original and block.erasure is erasure for block in tuple(_eager.holders))


def is_unrouted(key: int) -> bool:
    """Whether the hooks of the erasure with this `id` do nothing in the calling context."""
    return any(block.experts is None for block in _blocks_of(key))


def forced_experts(key: int) -> Tensor | None:
    """The experts that the calling context forces on its samples, if any."""
    forced = [block.experts for block in _blocks_of(key) if block.experts is not None]
    return forced[-1] if forced else None


def _blocks_of(key: int) -> list[_Block]:
    """The calling context's open blocks. Compiled code never runs inside one, so tracing skips the search."""
    if torch.compiler.is_compiling():
        return []
    return [block for block in _blocks.get() if block.open and id(block.erasure) == key]


@contextmanager
def _entered(block: _Block) -> Iterator[None]:
    def close() -> None:
        block.open = False
        _eager.let_go(block)
        # a block that ended out of order is dropped with the next one
        _blocks.set(tuple(other for other in _blocks.get() if other.open))

    with afterwards(close):
        _eager.hold(block)
        _blocks.set((*_blocks.get(), block))
        yield


class OriginalOutput:
    """A forward hook that replaces an edited layer's output by the original's, for one context's block."""

    def __init__(self, block: _Block, site: Site, original: Tensor):
        self.block = block
        self.site = site
        self.original = original
        self.parameters: dict[tuple[torch.device, torch.dtype], list[Tensor | None]] = {}

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.block.open or self.block not in _blocks.get():
            return None
        # Compute where and as the layer just did: the parameter itself may be back on the CPU (offloading) or
        # in the dtype in which it is only stored (layerwise casting).
        place = output.device, output.dtype
        if place not in self.parameters:
            weight, bias = self.site.parameters(self.original)
            self.parameters[place] = [weight.to(*place), None if bias is None else bias.to(*place)]
        dim = feature_dim(module)
        z = args[0].to(*place).movedim(dim, -1)
        return linear(z, *self.parameters[place]).movedim(-1, dim)


class _Eager:
    """
    Makes compiled models run eagerly while anyone holds it.

    The compiler's stance belongs to the process, and blocks of several threads may overlap: the first block
    sets the stance, and the last one restores it.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.holders: set[object] = set()
        self.stance = ExitStack()

    def hold(self, holder: object) -> None:
        with held(self.lock):
            if not self.holders:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.holders.add(holder)

    def let_go(self, holder: object) -> None:
        with held(self.lock):
            self.holders.discard(holder)
            if not self.holders:
                self.stance.close()


_eager = _Eager()


@contextmanager
def running_eagerly() -> Iterator[None]:
    """Inside the block, compiled models run eagerly."""
    holder = object()
    with afterwards(partial(_eager.let_go, holder)):
        _eager.hold(holder)
        yield
