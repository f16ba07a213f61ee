"""The proof by run: call the real head on forget and target prototypes before and after the edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..core.erasure import Erasure
from ..core.install import PROOF_TOLERANCE
from ..core.interrupts import unwound
from ..core.proof import proof_by_run
from ..core.views import experts_forced, routing_off
from .heads import evaluating, head_outputs


TRIED_EXPERTS = 8


class Trial(NamedTuple):
    """An expert, `None` for the mean, and whether the hook is on, which then takes it."""

    expert: int | None
    routed: bool


def prover(
    model: nn.Module, modules: Mapping[str, nn.Module], erasure: Erasure, current: Erasure | None
) -> Callable[[], dict[str, float]]:
    """
    Run the real heads on forget and target prototypes now, and return a function that runs them again and
    compares.

    The edited heads must make of both what the original makes of them after the remap. The mean expert is
    tried without the hook, since the weights alone must hold it, then up to eight experts with it. An inner
    module cannot be called on a prototype, so there its pre-hooks are called, and what they hand on is
    compared.
    """
    trials = [Trial(None, routed=True)]
    if erasure.router is not None:
        trials = [
            Trial(expert, routed=True) for expert in range(min(erasure.remap.num_experts, TRIED_EXPERTS))
        ]
    if erasure.sites:
        trials = [Trial(None, routed=False), *trials]
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    device, dtype = "cpu" if parameter.is_meta else parameter.device, parameter.dtype

    def outputs(trial: Trial, before: bool) -> Tensor:
        """The modules' outputs `(kinds, ...)` for each kind of feature that `proof_by_run` compares."""
        parts = []
        for name, module in modules.items():
            remap = erasure.remaps[name]
            forget = remap.prototypes.matrix[:, list(remap.forget)]
            source, target = forget.T, (forget + remap.shift(trial.expert)).T
            moved = [remap.apply(z, trial.expert) for z in (source, target)]
            kinds = [source, *moved] if before else [source, target]
            z = torch.cat(kinds).to(device, dtype)
            taken = torch.full((len(z),), trial.expert or 0)
            with experts_forced(erasure, taken) if trial.routed else routing_off(erasure):
                parts.append(head_outputs(module, z).cpu().double().reshape(len(kinds), -1))
        return torch.cat(parts, 1)

    def run(before: bool) -> tuple[Tensor, ...]:
        """Outputs `(trials, ...)` of each kind."""
        with evaluating(model), nullcontext() if erasure.sites else _passing_on(modules):
            return torch.stack([outputs(trial, before) for trial in trials]).unbind(1)

    return proof_by_run(
        run,
        current,
        PROOF_TOLERANCE[dtype],
        f"something other than the weight and the hook decides what `{next(iter(modules))}` does. The edit "
        "was rolled back; the model is as it was. Take adapters, hooks and wrappers off the head, erase, "
        "and put them back.",
    )


@contextmanager
def _passing_on(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The module returns what its pre-hooks hand to it."""
    (module,) = modules.values()
    with unwound() as stack:
        stack.enter_context(patch.object(module, "forward", lambda z, *args, **kwargs: z))
        yield
