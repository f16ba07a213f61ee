"""The proof by run: call the real model on forget and target prototypes, before and after the edit, and compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..erasure import Erasure
from ..errors import TargetNotFoundError
from .concepts import BEGIN
from .hook import enable_hook
from .sites import Denoiser


# What the proof accepts, in units of the output difference between forget and target before the edit: rounding of the weights and
# features in the model's dtype. A single missed layer shows as 0.05 or more.
PROOF_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


def prover(denoiser: Denoiser, erasure: Erasure, current: Erasure | None) -> Callable[[], dict[str, float]]:
    """Run the real model on forget and target prototypes now, and return a function that runs it again and compares.

    The text is the begin token followed by every forget prototype, or by what each is sent to. Before the edit the two differ;
    after it they must not, and the target's output must be what it was.
    """
    remap, hook = erasure.remap, erasure.hook
    P = remap.prototypes.matrix
    experts = list(range(min(remap.num_experts, 8))) if hook is not None else [None]
    begin, forget = remap.prototypes[BEGIN][:, None], P[:, list(remap.forget)]
    sources = [torch.cat([begin, forget], 1).T for _ in experts]
    targets = [torch.cat([begin, forget + remap.shift(expert)], 1).T for expert in experts]
    text = torch.stack([*sources, *targets])  # (2 * len(experts), 1 + f, d)

    @torch.no_grad()
    def run() -> tuple[Tensor, Tensor]:
        training = [module for module in denoiser.module.modules() if module.training]
        if hook is not None:
            hook.forced = torch.tensor(experts * 2)
        denoiser.module.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # the proof's shapes must not make the user's compiled model recompile
                return denoiser.family.call(denoiser.module, text).double().flatten(1).chunk(2)
        finally:
            for module in training:
                module.training = True
            if hook is not None:
                hook.forced = None

    if current is None:
        source, target = run()
    else:
        with current.original_weights():
            enable_hook(current, False)
            source, target = run()
            enable_hook(current, True)
    apart = (source - target).norm(dim=1)

    def prove() -> dict[str, float]:
        new_source, new_target = run()
        proof = {
            "forget_vs_target": float(((new_source - new_target).norm(dim=1) / apart).max()),
            "target_changed": float(((new_target - target).norm(dim=1) / apart).max()),
            "forget_changed": float(((new_source - source).norm(dim=1) / apart).min()),
        }
        tolerance = PROOF_TOLERANCE[next(iter(erasure.sites.values())).read().dtype]
        if not (proof["forget_vs_target"] < tolerance and proof["target_changed"] < tolerance and proof["forget_changed"] > 0.5):
            measured = ", ".join(f"{key} {value:.2g}" for key, value in proof.items())
            raise TargetNotFoundError(
                f"The proof by run failed ({measured}; tolerance {tolerance:g}): the model does not read the prompt through the edited "
                "layers alone. The edit was rolled back; the pipeline is as it was."
            )
        return proof

    return prove
