"""The hooks that route: the expert that a prompt's features go through before the denoiser's layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.erasure import Erasure
from ..core.hook import RoutingHook
from ..core.remap import Remap
from .families import Place
from .sites import Denoiser


class PromptHook(RoutingHook):
    """
    The pre-hook of a denoiser: the tokens `(batch, tokens, d)` become E_e z.

    The features of the `others`, space -> remap, go through the same expert of their own space: those of
    other spaces of tokens, and a pooled one `(batch, d')`. `places` says where each space is among the
    arguments, `arguments` the names of `forward`'s parameters, for those that are given by position. What
    comes first is what `RoutingHook` takes.
    """

    with_kwargs = True

    def __init__(
        self,
        *factors: Any,
        others: Mapping[str, Remap] | None = None,
        places: Mapping[str, Place] | None = None,
        arguments: tuple[str, ...] = (),
    ):
        super().__init__(*factors)
        self.arguments = arguments
        self.places = places
        # Their experts are given, so their router is never asked; the random one needs no memory.
        self.others = {
            space: RoutingHook(remap, "random", *factors[2:]) for space, remap in (others or {}).items()
        }

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.acts:
            return None
        # By name, whether they were given by position or not.
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        (name,) = self.places["tokens"]
        # The tokens decide for all: experts that differ between spaces would leave the concept recoverable.
        experts = self.experts(kwargs[name])
        for space, hook in {"tokens": self, **self.others}.items():
            kwargs = _replaced(kwargs, self.places[space], partial(hook.route, experts=experts))
        return (), kwargs


class NormHook(RoutingHook):
    """
    The forward hook of a norm in front of the layer that reads text: its output z becomes E_e z.

    A model that joins all samples `(tokens of all, d)` has a `samples` hook, which knows where each one ends.
    What comes first is what `RoutingHook` takes.
    """

    def __init__(self, *factors: Any, samples: SampleHook | None = None):
        super().__init__(*factors)
        self.samples = samples

    def register(self, module: nn.Module) -> RemovableHandle:
        """See `RoutingHook.register`."""
        return module.register_forward_hook(self, prepend=True)

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.acts:
            return None
        if self.samples is None:
            return self.route(output)
        lengths = self.samples.lengths
        # Z-Image pads every prompt to a multiple of this length before it joins them.
        pieces = output.split([length + -length % SEQ_MULTI_OF for length in lengths])
        # the router sees the prompt's own tokens, without the first, which is the same everywhere
        means = [piece[1:length].mean(0) for piece, length in zip(pieces, lengths, strict=True)]
        experts = self.experts(torch.stack(means))
        routed = [self.route(z[None], expert[None])[0] for z, expert in zip(pieces, experts, strict=True)]
        return torch.cat(routed)


class SampleHook(RoutingHook):
    """The pre-hook of Z-Image's transformer, which joins its samples: it notes how long each prompt is."""

    with_kwargs = True

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        texts = args[2] if len(args) > 2 else kwargs["cap_feats"]
        self.lengths = [len(text) for text in texts]


def _replaced(values: Any, place: Place, change: Callable[[Tensor], Tensor]) -> dict[str, Any] | list[Tensor]:
    """A copy of a mapping, or of a tensor's rows as a list, with the value at one place changed."""
    name, *inner = place
    values = dict(values) if isinstance(values, Mapping) else list(values)
    values[name] = _replaced(values[name], tuple(inner), change) if inner else change(values[name])
    return values


def at_place(values: Any, place: Place) -> Tensor:
    """The value at a place of nested mappings and lists."""
    for name in place:
        values = values[name]
    return values


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's arguments, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def make_hooks(denoiser: Denoiser, erasure: Erasure, device: torch.device) -> tuple[RoutingHook, ...]:
    """The hooks of `hooked_modules`, if the erasure has a router and factors; the first one routes."""
    if erasure.router is None or not erasure.remaps:
        return ()
    factors = erasure.remap, erasure.router, device, id(erasure)
    if denoiser.family.joined:
        samples = SampleHook()
        return NormHook(*factors, samples=samples), samples
    if denoiser.family.norms:
        return (NormHook(*factors),)
    arguments = arguments_of(next(iter(denoiser.parts.values())))
    places = denoiser.routed_places
    others = {
        space: remap for space, remap in erasure.remaps.items() if space in places and space != "tokens"
    }
    hooks = [PromptHook(*factors, others=others, places=places, arguments=arguments) for _ in denoiser.parts]
    for hook in hooks:  # denoisers that take turns draw from one stream of experts
        hook.router = hooks[0].router
    return tuple(hooks)


def hooked_modules(denoiser: Denoiser) -> list[nn.Module]:
    """The modules that have a hook if the erasure has a router, in the order of `make_hooks`."""
    norms = [denoiser.module.get_submodule(name) for name in denoiser.family.norms.values()]
    return [*norms, *denoiser.parts.values()]
