"""The proof by run: call the real model on forget and target prototypes, before and after the edit, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..erasure import Erasure
from ..errors import TargetNotFoundError
from .concepts import BEGIN
from .hook import hook_off
from .sites import Denoiser, lora_branches


# What the proof accepts, in units of the output difference between forget and target before the edit: rounding of the weights and
# features in the model's dtype. A single missed layer shows as 0.05 or more.
PROOF_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


def prover(denoiser: Denoiser, erasure: Erasure, current: Erasure | None) -> Callable[[], dict[str, float]]:
    """Run the real model on forget and target prototypes now, and return a function that runs it again and compares.

    The text is the begin token followed by every forget prototype, or by what each is sent to. Before the edit the two differ;
    after it they must not, and the target's output must be what it was. The mean expert is tried without the routing hook, since the
    weights alone must hold it, then up to eight experts with it. A LoRA is switched off: it reads the text beside the edited layers.
    """
    remap, hook = erasure.remap, erasure.hook
    begin, forget = remap.prototypes[BEGIN][:, None], remap.prototypes.matrix[:, list(remap.forget)]
    experts = range(min(remap.num_experts, 8)) if hook is not None else ()
    mean_text = _stack(begin, forget, [remap.shift()])
    expert_text = _stack(begin, forget, [remap.shift(expert) for expert in experts]) if experts else None

    def call(text: Tensor) -> tuple[Tensor, Tensor]:
        return denoiser.family.call(denoiser.module, text).double().flatten(1).chunk(2)

    @torch.no_grad()
    def run() -> tuple[Tensor, Tensor]:
        """Outputs `(1 + experts, ...)` for sources and for targets."""
        with _plain(denoiser):
            with hook_off(erasure):
                outputs = [call(mean_text)]
            if expert_text is not None:
                hook.forced = torch.tensor([*experts] * 2)
                try:
                    outputs.append(call(expert_text))
                finally:
                    hook.forced = None
        return tuple(torch.cat(part) for part in zip(*outputs, strict=True))

    if current is None:
        source, target = run()
    else:
        with hook_off(current), current.original_weights():
            source, target = run()
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
                "layers alone. The edit was rolled back; the pipeline is as it was. Take custom attention processors and offloading off "
                "(`unet.set_default_attn_processor()`), erase, and put them back."
            )
        return proof

    return prove


def _stack(begin: Tensor, forget: Tensor, shifts: list[Tensor]) -> Tensor:
    """`(2 * len(shifts), 1 + f, d)`: the forget prototypes for every shift, then what they are sent to."""
    moved = [torch.cat([begin, forget + shift], 1).T for shift in shifts]
    return torch.stack([torch.cat([begin, forget], 1).T for _ in shifts] + moved)


@contextmanager
def _plain(denoiser: Denoiser) -> Iterator[None]:
    """No dropout, no LoRA, no compilation (the proof's shapes must not make the user's model recompile); all put back afterwards."""
    training = [module for module in denoiser.module.modules() if module.training]
    loras = [(layer, layer.disable_adapters) for layer in lora_branches(denoiser)]
    denoiser.module.eval()
    for layer, _ in loras:
        layer._disable_adapters = True  # `enable_adapters(False)` would change requires_grad
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, disabled in loras:
            layer._disable_adapters = disabled
        for module in training:
            module.training = True
