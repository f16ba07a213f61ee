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
from ..core.facts import is_text, kind_of
from ..core.install import PROOF_TOLERANCE
from ..core.interrupts import afterwards, unwound
from ..core.proof import proof_by_run
from ..core.remap import Remap
from ..core.site import feature_dim
from ..core.views import experts_forced, original_layers_shown, routing_off, running_eagerly
from .sites import Denoiser, lora_branches


# An exact E sends p_t + c (p_f − p_t) to p_t for every c; with a c above 1 the difference stands out from the
# rounding of half precision.
SPREAD = 4
TOLERANCE = {**PROOF_TOLERANCE, torch.bfloat16: 2e-1}  # thanks to SPREAD, less is needed for rounding here
# the relative error accepted from one linear layer: rounding of its inputs, weights and sums
LAYER_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
TRIED_EXPERTS = 8

Text = dict[str, Tensor]  # space -> features of a batch


def prover(denoiser: Denoiser, erasure: Erasure, current: Erasure | None) -> Callable[[], dict[str, float]]:
    """
    Run the real model on forget and target prototypes now, and return a function that runs it again and
    compares.

    The text is a prototype that stays, followed by every forget prototype or by what each is sent to. If the
    model reads layers of a language model, a text that holds those of all layers follows; if it reads a
    pooled feature, texts with each pooled forget prototype or its target, so that each way of the prompt into
    the model is compared in its own units. On these texts, the edited model must give what the original gives
    on the texts as the remap moves them. The mean expert is tried without the routing hook, since the weights
    alone must hold it; then up to eight experts are tried with it. A LoRA is switched off, because it reads
    the text next to the edited layers. Two denoisers are both run, each compared in its own units.

    One layer of a language model among dozens moves the output by little more than half precision rounds it.
    So the layers that read them are asked one by one as well, like layers inside the denoiser.
    """
    experts = range(min(erasure.remap.num_experts, TRIED_EXPERTS)) if erasure.hooks else ()
    text_remaps = _text_remaps(erasure)
    inner = [name for name, site in erasure.sites.items() if not is_text(site.space)]

    @torch.no_grad()
    def run(before: bool) -> list[Tensor]:
        """Outputs of all rows, `(rows, ...)`, for each kind of text that `proof_by_run` compares."""
        mean_texts = _texts(text_remaps, None, before)
        expert_texts = [_texts(text_remaps, expert, before) for expert in experts]
        modules = denoiser.parts.values()
        with _plain(denoiser), original_layers_shown(erasure, inner):
            # The weights alone must hold the mean expert ...
            with routing_off(erasure):
                outputs = [_outputs(denoiser, module, [mean_texts]) for module in modules]
            # ... and with the hook every sample must get its own.
            if expert_texts:
                rows = len(mean_texts[0]["tokens"])
                sample_experts = torch.tensor(experts).repeat_interleave(rows).repeat(len(mean_texts))
                with experts_forced(erasure, sample_experts):
                    outputs += [_outputs(denoiser, module, expert_texts) for module in modules]
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)]

    prove = proof_by_run(
        run,
        current,
        TOLERANCE[next(iter(erasure.sites.values())).read().dtype],
        "the prompt reaches the model by other ways than the edited layers. The edit was rolled back; the "
        "pipeline is unchanged. Remove custom attention processors and offloading "
        "(`unet.set_default_attn_processor()`), erase, and put them back.",
    )
    asked = [name for name, site in erasure.sites.items() if kind_of(site.space) in ("layers", "denoiser")]
    if not asked:
        return prove
    return lambda: {**prove(), **_prove_layers(denoiser, erasure, asked)}


def _outputs(denoiser: Denoiser, module: nn.Module, texts: Sequence[Sequence[Text]]) -> tuple[Tensor, ...]:
    """
    The flattened outputs of one call on all texts, in one chunk `(rows, ...)` for each kind.

    `texts[e]` are expert e's texts, one of each kind; the batch holds all texts of the first kind, then all
    of the next.
    """
    kinds = len(texts[0])
    batch = []
    for kind in range(kinds):
        batch += [expert_texts[kind] for expert_texts in texts]
    joined = {space: torch.cat([text[space] for text in batch]) for space in batch[0]}
    with _fed_behind_norms(denoiser, joined):
        return denoiser.family.call(module, joined).double().flatten(1).chunk(kinds)


@torch.no_grad()
def _prove_layers(denoiser: Denoiser, erasure: Erasure, names: Sequence[str]) -> dict[str, float]:
    """
    Run the edited denoiser once, and inside that pass ask each of these layers a second time for W′ z + b.

    A whole pass cannot be fed with chosen activations, since each layer's come from the layers before it. But
    a layer's answer inside the pass, with everything attached to it, shows whether its edited weight is used.

    Returns:
        `dict[str, float]`: `denoiser_off`, the largest ‖answer − (W′ z + b)‖ / ‖W′ z + b‖, and
        `denoiser_changed`, the smallest share by which the answer differs from the original's.

    Raises:
        `SiteNotFoundError`: an answer is off by more than rounding.
    """
    off: dict[str, float] = {}
    changed: dict[str, float] = {}

    def ask(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if name in off:  # the call below, or a later one of the pass
            return
        off[name] = 0.0
        remap, z = erasure.remap_of(name), args[0]
        # 1. Ask for the directions that the edit reads, at a prototype's length, and for what it must keep.
        rows = torch.linalg.qr(remap.D_F.T).Q.T * remap.remain.norm(dim=0).mean()
        rows = torch.cat([rows, remap.remain.T]).to(z)
        dim = feature_dim(module)
        column = rows[None, :, None].movedim(-1, dim)  # a picture that is one pixel wide
        answer = module(column).movedim(dim, -1)[0, :, 0].double()
        # 2. Compute the same from the original weight and the remap.
        original = erasure.originals[name].to(z.device)
        bias = erasure.sites[name].read_bias()
        if bias is not None:
            bias = bias.to(z.device).double()
        expected = linear(rows.double(), remap.merged(original).double(), bias)
        before = linear(rows.double(), original.double(), bias)
        off[name] = float((answer - expected).norm() / expected.norm())
        changed[name] = float((expected - before).norm() / before.norm())

    # The prompt of the pass is the first prototype of each space, which always stays.
    text = {}
    for space, remap in _text_remaps(erasure).items():
        stays = remap.prototypes.matrix[:, 0]
        text[space] = stays[None] if space == "pooled" else stays[None, None]
    with _plain(denoiser), routing_off(erasure), unwound() as hooks:
        for name in names:
            module = erasure.sites[name].module
            hooks.callback(module.register_forward_hook(partial(ask, name)).remove)
        denoiser.family.call(denoiser.module, text)
    tolerance = LAYER_TOLERANCE[erasure.sites[names[0]].read().dtype]
    wrong = [name for name in names if not off.get(name, torch.inf) < tolerance]  # a NaN counts as wrong
    if wrong:
        raise SiteNotFoundError(
            f"The proof by run failed: {len(wrong)} of {len(names)} edited layers inside the denoiser do not "
            f"compute with their weight (first: `{wrong[0]}`, off by {off.get(wrong[0], torch.inf):.2g}). "
            "The edit was rolled back; the pipeline is unchanged. Remove adapters and offloading, erase, and "
            "put them back."
        )
    return {"denoiser_off": max(off.values()), "denoiser_changed": min(changed.values())}


def _texts(remaps: Mapping[str, Remap], expert: int | None, before: bool) -> list[Text]:
    """
    The texts to run, one of each kind: `[sources, targets]`, or `before` the edit `[sources, moved sources,
    moved targets]`, moved as the expert does.

    A text is a batch of rows: one with all forget prototypes (or their targets) among its tokens
    `(rows, 1 + f, d)`, one with those of all layers of a language model, then one for each pooled one
    `(rows, d')`. The other features of a row are their space's first prototype, which always stays.
    """
    sources, targets, stays = {}, {}, {}
    for space, remap in remaps.items():
        shift = remap.shift(expert).T
        targets[space] = remap.prototypes.matrix[:, list(remap.forget)].T + shift
        sources[space] = targets[space] - SPREAD * shift
        stays[space] = remap.prototypes.matrix[:, 0]
    sides = [sources, targets]
    if before:
        moved = []
        for side in sides:
            moved.append({space: remaps[space].apply(z, expert) for space, z in side.items()})
        sides = [sources, *moved]
    return [_rows(side, stays) for side in sides]


def _text_remaps(erasure: Erasure) -> dict[str, Remap]:
    """The remaps of the spaces that come from the prompt."""
    return {space: remap for space, remap in erasure.remaps.items() if is_text(space)}


def _rows(features: Text, stays: Text) -> Text:
    own: Text = {}  # the rows in which a space has more than what stays
    first: dict[str, int] = {}  # where they begin; all layers share one row
    total = 0
    for space, z in features.items():
        own[space] = z if space == "pooled" else torch.cat([stays[space][None], z])[None]
        if kind_of(space) not in first:
            first[kind_of(space)] = total
            total += len(own[space])
    joined = {}
    for space, rows in own.items():
        start = first[kind_of(space)]
        joined[space] = stays[space].repeat(total, *rows.shape[1:-1], 1)
        joined[space][start : start + len(rows)] = rows
    return joined


@contextmanager
def _fed_behind_norms(denoiser: Denoiser, text: Text) -> Iterator[None]:
    """Inside the block, each norm outputs the given text, since no input of a norm would give a prototype."""
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
    Inside the block there is no dropout, no LoRA and no compilation (the proof's shapes must not make the
    user's model recompile). Afterwards, everything is as before.
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
