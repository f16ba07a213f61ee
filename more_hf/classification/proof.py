"""The proof by run of a classifier: its heads and routing hooks are asked one by one, on the edited model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..core.erasure import Erasure
from ..core.interrupts import unwound
from ..core.proof import TRIED_EXPERTS, Measurements, probes
from ..core.views import experts_forced, routing_off
from .heads import evaluating


def prover(
    model: nn.Module, modules: Mapping[str, nn.Module], erasure: Erasure
) -> Callable[[Mapping[str, Tensor]], dict[str, float]]:
    """
    Return a function that takes the edited weights and asks each head, without its hook, whether it computes
    with its own; then each hook for what up to eight experts make of the forgotten prototypes.

    The function returns the measurements of `Measurements.require_edited`, and raises as it does.
    """
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    like = torch.empty(0, dtype=parameter.dtype, device="cpu" if parameter.is_meta else parameter.device)
    experts: list[int | None] = [None]
    if erasure.router is not None:
        experts = [*range(min(erasure.remap.num_experts, TRIED_EXPERTS))]

    def prove(edited: Mapping[str, Tensor]) -> dict[str, float]:
        measured = Measurements()
        with evaluating(model):
            with routing_off(erasure):
                for name, site in erasure.sites.items():
                    rows, original = probes(erasure.remap_of(name)), erasure.originals[name]
                    measured.ask_layer(site, rows, edited[name], original, like)
            for expert in experts:
                for name, module in modules.items():  # in order: the first one's hook picks the expert
                    remap = erasure.remaps[name]
                    z = remap.prototypes.matrix[:, list(remap.forget)].T.to(like)
                    with experts_forced(erasure, torch.full((len(z),), expert or 0)):
                        routed = _routed(module, z, is_head=bool(erasure.sites))
                    measured.compare_routed(f"expert {expert} of `{name}`", routed, z, remap, expert)
        return measured.require_edited(erasure.sites)

    return prove


def _routed(module: nn.Module, z: Tensor, *, is_head: bool) -> Tensor:
    """Features `(n, d)` as the module reads them behind its pre-hooks."""
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(args[0])

    with unwound() as stack:
        stack.callback(module.register_forward_pre_hook(keep).remove)
        if not is_head:  # a block may need more than a feature to run
            stack.enter_context(patch.object(module, "forward", lambda z, *args, **kwargs: z))
        module(z[..., None, None] if isinstance(module, nn.Conv2d) else z)
    return read[0].flatten(1)
