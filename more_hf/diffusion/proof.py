"""
The proof by run: call the real model on forget and target prototypes, before and after the edit, and compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.erasure import Erasure
from ..core.errors import SiteNotFoundError
from ..core.facts import TEXT_SPACES
from ..core.install import PROOF_TOLERANCE
from ..core.interrupts import afterwards, unwound
from ..core.proof import proof_by_run
from ..core.remap import Remap
from ..core.views import experts_forced, original_layers_shown, routing_off, running_eagerly
from .sites import Denoiser, lora_branches


# An exact E sends p_t + c (p_f − p_t) to p_t for every c; a larger one stands out from half precision's
# rounding.
SPREAD = 4
TOLERANCE = {**PROOF_TOLERANCE, torch.bfloat16: 2e-1}  # so that less is allowed to rounding here
# what an answer of one linear layer may be off by, as a share: rounding of its inputs, weights and sums
LAYER_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
TRIED_EXPERTS = 8

Text = dict[str, Tensor]  # space -> features of a batch


def prover(denoiser: Denoiser, erasure: Erasure, current: Erasure | None) -> Callable[[], dict[str, float]]:
    """
    Run the real model on forget and target prototypes now, and return a function that runs it again and
    compares.

    The text is a prototype that stays followed by every forget prototype, or by what each is sent to; then,
    where the model reads a pooled feature, each of its forget prototypes, or what it is sent to, so that each
    way of the prompt into the model is compared in its own units. The edited model must make of it what the
    original makes of the text that the remap has moved. The mean expert is tried without the routing hook,
    since the weights alone must hold it, then up to eight experts with it. A LoRA is switched off: it reads
    the text next to the edited layers. Each of two denoisers is run, and compared in its own units.
    """
    experts = range(min(erasure.remap.num_experts, TRIED_EXPERTS)) if erasure.hooks else ()
    read_text = _reading_text(erasure)
    inner = [name for name, site in erasure.sites.items() if site.space not in TEXT_SPACES]
    modules = denoiser.parts.values()

    def call(module: nn.Module, texts: Sequence[Sequence[Text]]) -> tuple[Tensor, ...]:
        sides = [text for side in zip(*texts, strict=True) for text in side]  # all of one kind, then the next
        joined = {space: torch.cat([text[space] for text in sides]) for space in sides[0]}
        with _fed_behind_norms(denoiser, joined):
            return denoiser.family.call(module, joined).double().flatten(1).chunk(len(texts[0]))

    @torch.no_grad()
    def run(before: bool) -> list[Tensor]:
        """Outputs of all rows, `(rows, ...)`, for each kind of text that `proof_by_run` compares."""
        mean_texts = _texts(read_text, None, before)
        expert_texts = [_texts(read_text, expert, before) for expert in experts]
        with _plain(denoiser), original_layers_shown(erasure, inner):
            with routing_off(erasure):
                outputs = [call(module, [mean_texts]) for module in modules]
            if expert_texts:
                rows = len(mean_texts[0]["tokens"])
                taken = torch.tensor(experts).repeat_interleave(rows).repeat(len(mean_texts))
                with experts_forced(erasure, taken):
                    outputs += [call(module, expert_texts) for module in modules]
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)]

    prove = proof_by_run(
        run,
        current,
        TOLERANCE[next(iter(erasure.sites.values())).read().dtype],
        "the model does not read the prompt through the edited layers alone. The edit was rolled back; the "
        "pipeline is as it was. Take custom attention processors and offloading off "
        "(`unet.set_default_attn_processor()`), erase, and "
        "put them back.",
    )
    if not inner:
        return prove
    return lambda: {**prove(), **_prove_layers(denoiser, erasure, inner)}


@torch.no_grad()
def _prove_layers(denoiser: Denoiser, erasure: Erasure, names: Sequence[str]) -> dict[str, float]:
    """
    One pass of the edited denoiser, in which each of these layers is asked once more for W′ z + b.

    A whole pass cannot be fed with activations, since each layer's are made by those before it. What a layer
    answers inside it, with all that hangs on it, shows whether its edited weight is what is read.

    Returns:
        `dict[str, float]`: `denoiser_off`, the largest ‖answer − (W′ z + b)‖ / ‖W′ z + b‖, and
        `denoiser_changed`, the smallest share by which the answer differs from the original's.

    Raises:
        `SiteNotFoundError`: an answer is off by more than rounding.
    """
    off: dict[str, float] = {}
    changed: dict[str, float] = {}

    def ask(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if name in off:  # this is the answer
            return
        off[name] = 0.0
        remap, z = erasure.remap_of(name), args[0]
        # what the edit reads most, as long as a prototype, and what it should leave
        rows = torch.linalg.qr(remap.D_F.T).Q.T * remap.remain.norm(dim=0).mean()
        rows = torch.cat([rows, remap.remain.T]).to(z)
        answer = module(rows[None])[0].double()
        bias, original = erasure.sites[name].read_bias(), erasure.originals[name].to(z.device)
        edited = remap.merged(original)
        expected, before = (
            linear(rows.double(), weight.double(), None if bias is None else bias.to(z.device).double())
            for weight in (edited, original)
        )
        off[name] = float((answer - expected).norm() / expected.norm())
        changed[name] = float((expected - before).norm() / before.norm())

    text = {}
    for space, remap in _reading_text(erasure).items():
        stays = remap.prototypes.matrix[:, 0]
        text[space] = stays[None] if space == "pooled" else stays[None, None]
    with _plain(denoiser), routing_off(erasure), unwound() as hooks:
        for name in names:
            module = erasure.sites[name].module
            hooks.callback(module.register_forward_hook(partial(ask, name)).remove)
        denoiser.family.call(denoiser.module, text)
    tolerance = LAYER_TOLERANCE[erasure.sites[names[0]].read().dtype]
    wrong = [name for name in names if not off.get(name, torch.inf) < tolerance]  # a NaN is wrong, too
    if wrong:
        raise SiteNotFoundError(
            f"The proof by run failed: {len(wrong)} of {len(names)} edited layers inside the denoiser do not "
            f"answer with their weight (first: `{wrong[0]}`, off by {off.get(wrong[0], torch.inf):.2g}). The "
            "edit was rolled back; the pipeline is as it was. Take adapters and offloading off, erase, and "
            "put them back."
        )
    return {"denoiser_off": max(off.values()), "denoiser_changed": min(changed.values())}


def _texts(remaps: Mapping[str, Remap], expert: int | None, before: bool) -> list[Text]:
    """
    Rows with all forget prototypes among their tokens `(rows, 1 + f, d)`, then one for each that is pooled
    `(rows, d')`; the same with their targets. `before` the edit the first, then both as the expert moves
    them. The other feature of a row is the space's first prototype, which always stays.
    """
    sources, targets, stays = {}, {}, {}
    for space, remap in remaps.items():
        shift = remap.shift(expert).T
        targets[space] = remap.prototypes.matrix[:, list(remap.forget)].T + shift
        sources[space] = targets[space] - SPREAD * shift
        stays[space] = remap.prototypes.matrix[:, 0]
    sides = [sources, targets]
    if before:
        moved = [
            {space: remaps[space].apply(z, expert) for space, z in side.items()}
            for side in (sources, targets)
        ]
        sides = [sources, *moved]
    return [_rows(side, stays) for side in sides]


def _reading_text(erasure: Erasure) -> dict[str, Remap]:
    return {space: remap for space, remap in erasure.remaps.items() if space in TEXT_SPACES}


def _rows(features: Text, stays: Text) -> Text:
    tokens = torch.cat([stays["tokens"][None], features["tokens"]])[None]
    if "pooled" not in features:
        return {"tokens": tokens}
    plain = stays["tokens"].expand(len(features["pooled"]), tokens.shape[1], -1)
    return {
        "tokens": torch.cat([tokens, plain]),
        "pooled": torch.cat([stays["pooled"][None], features["pooled"]]),
    }


@contextmanager
def _fed_behind_norms(denoiser: Denoiser, text: Text) -> Iterator[None]:
    """Inside the block what comes out of a norm is the given text itself: no norm gives a prototype."""
    with unwound() as hooks:
        for space, name in denoiser.family.norms.items():
            hook = partial(_as_output, text[space])
            norm = denoiser.module.get_submodule(name)
            hooks.callback(norm.register_forward_hook(hook, prepend=True).remove)
        yield


def _as_output(z: Tensor, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Features `(batch, tokens, d)` in place of a norm's output, which may be joined and padded."""
    samples = output.reshape(len(z), -1, output.shape[-1]).clone()
    samples[:, : z.shape[1]] = z.to(samples)
    return samples.reshape(output.shape)


@contextmanager
def _plain(denoiser: Denoiser) -> Iterator[None]:
    """
    No dropout, no LoRA, no compilation (the proof's shapes must not make the user's model recompile); as
    before after.
    """
    training = [module for module in denoiser.module.modules() if module.training]
    loras = [(layer, layer.disable_adapters) for layer in lora_branches(denoiser)]

    def undo() -> None:
        for layer, disabled in loras:
            layer._disable_adapters = disabled
        for module in training:
            module.training = True

    with afterwards(undo), running_eagerly():
        denoiser.module.eval()
        for layer, _ in loras:
            layer._disable_adapters = True  # `enable_adapters(False)` would change requires_grad
        yield
