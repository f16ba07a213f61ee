"""The proof by run: call the real head on forget and target prototypes, before and after the edit, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..core.erasure import PROOF_TOLERANCE, Erasure
from ..core.proof import proof_by_run
from .heads import evaluating


def prover(model: nn.Module, modules: Mapping[str, nn.Module], erasure: Erasure, current: Erasure | None) -> Callable[[], dict[str, float]]:
    """Run the real heads on forget and target prototypes now, and return a function that runs them again and compares.

    Before the edit the two differ; after it they must not, and the target's logits must be what they were. The mean expert is tried
    without the hook, since the weights alone must hold it, then up to eight experts with it. An inner module cannot be called on a
    prototype, so there its pre-hooks are called, and what they hand on is compared.
    """
    routed = erasure.router is not None
    # (the expert whose target is shown, the expert that the hook is made to take; None for no hook)
    trials = [(expert, expert) for expert in range(min(erasure.remap.num_experts, 8))] if routed else [(None, 0)]
    if erasure.sites:
        trials = [(None, None), *trials]
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    dtype = parameter.dtype

    def show(expert: int | None, taken: int | None) -> Tensor:
        """What the modules make of `(2 f, d)`, forget prototypes and their targets: `(2, ...)`."""
        hook, outputs = erasure.hook, []
        for name, module in modules.items():
            remap = erasure.remap_of(name)
            forget = remap.prototypes.matrix[:, list(remap.forget)]
            z = torch.cat([forget, forget + remap.shift(expert)], 1).T.to(parameter.device if not parameter.is_meta else "cpu", dtype)
            if hook is not None:
                hook.enabled, hook.forced = taken is not None, torch.full((len(z),), taken or 0)
            outputs.append(module(z).cpu().double().reshape(2, -1))
        return torch.cat(outputs, 1)

    def run() -> tuple[Tensor, Tensor]:
        """Outputs `(trials, ...)` for sources and for targets."""
        try:
            with evaluating(model), nullcontext() if erasure.sites else _handing_on(modules):
                return torch.stack([show(*trial) for trial in trials]).unbind(1)
        finally:
            if erasure.hook is not None:
                erasure.hook.enabled, erasure.hook.forced = True, None

    return proof_by_run(
        run,
        current,
        PROOF_TOLERANCE[dtype],
        f"something besides the weight and the hook decides what `{next(iter(modules))}` does. The edit was rolled back; the model is as "
        "it was. Take adapters, hooks and wrappers off the head, erase, and put them back.",
    )


@contextmanager
def _handing_on(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The module returns what its pre-hooks hand to it."""
    (module,) = modules.values()
    with patch.object(module, "forward", lambda z, *args, **kwargs: z):
        yield
