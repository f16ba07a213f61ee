"""Attacks with the files alone: what the edited weights still give, and what surrounds them changed."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from more_hf.diffusion.encoder import Encoder
from more_hf.diffusion.sites import find_denoiser, find_sites

from ...classes.metrics import auc
from ..store import Result
from .victim import Victim


UNREACHABLE = 1e-3  # a direction of E this much weaker than its strongest counts as outside its range


def closed_form(victim: Victim, *, rho: float = 1e-6) -> Iterator[Result]:
    """
    Look for the concept in the edited weights W', compared with the original's W, all layers together.

    Yields:
        the judges' result for pictures of RECE's adversarial embedding c' of each test prompt;
        `residual`, ‖W c − W' c'‖ / ‖W c‖ over the test prompts' own tokens, which no prompt and no learned
        token can go below as ρ → 0; and, as variant "by name", the same for c itself;
        `angle`, in degrees, between the concept's feature p_f and the range of E in W' = W E;
        `auc` of linear probes on edited keys and values that tell the concept's name from the others'.

    Source: RECE (Gong et al., ECCV 2024), its closed form for the adversarial embedding.

    Args:
        rho (`float`):
            The ridge of the adversarial embedding; RECE erases with 1e-3.
    """
    studio = victim.studio
    W, edited = stacked(studio.original), stacked(victim.pipe)
    # c: the test prompts' features, compared at their own tokens.
    encoder = Encoder(studio.original)
    prompts = victim.prompts(victim.concept)
    c = encoder.encode(prompts).double().cpu()
    own = torch.zeros(c.shape[:2], dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        for words, padding in encoder.ordinary_spans(prompt):
            own[row, words.start : padding.stop] = True
    wanted = c[own] @ W.T
    yield Result(relative(c[own] @ edited.T, wanted), variant="by name", measure="residual")

    # RECE's embedding is the ridge solution of W' c' = W c over all layers together.
    left = rho * torch.eye(W.shape[1], dtype=W.dtype) + edited.T @ edited
    adversarial = c @ torch.linalg.solve(left, edited.T @ W).T
    yield victim.drawn(victim.pipe, adversarial.float(), "closed-form", variant="embedding")
    reached = relative(adversarial[own] @ edited.T, wanted)
    yield Result(reached, variant="embedding", measure="residual")

    # E is the least-squares solution of W E = W'.
    E = torch.linalg.lstsq(W, edited).solution
    p_f = encoder.encode([victim.concept])[0, len(encoder.token_ids(victim.concept))].double().cpu()
    yield Result(angle_to_range(E, p_f), measure="angle")
    for layer, weight in (("keys", "to_k"), ("values", "to_v")):
        area = probe(victim, stacked(victim.pipe, weight), encoder)
        yield Result(area, variant=f"probe of {layer}", measure="auc")


def stacked(pipe: StableDiffusionPipeline, ending: str = "") -> Tensor:
    """The weights of the layers that read text, stacked: float64 `(sum of widths, d)`."""
    sites = find_sites(pipe, find_denoiser(pipe))
    return torch.cat([site.read().double().cpu() for name, site in sites.items() if name.endswith(ending)])


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())


def angle_to_range(E: Tensor, p: Tensor) -> float:
    """The angle in degrees between a vector `(d,)` and the range of a matrix `(d, d)`."""
    U, s, _ = torch.linalg.svd(E)
    inside = U[:, s > UNREACHABLE * s[0]].T @ p
    return math.degrees(math.acos(min(1.0, float(inside.norm() / p.norm()))))


def probe(victim: Victim, weight: Tensor, encoder: Encoder, ridge: float = 1e-2) -> float:
    """
    The area under the curve, in percent, of a linear probe that tells the concept's name from all others.

    The probe is a ridge regression on `weight` `(width, d)` times the end token of every second test prompt,
    with every name filled in, and is measured on the other prompts.
    """
    names = victim.studio.names(victim.studio.kind(victim.concept))
    rows: list[list[Tensor]] = []  # for each prompt, a row for each name
    for prompt in dict.fromkeys(victim.prompts("{}")):
        texts = [prompt.replace("{}", name) for name in names]
        ends = [len(encoder.token_ids(text)) + 1 for text in texts]
        features = encoder.encode(texts).double().cpu()
        rows.append([z[end] @ weight.T for z, end in zip(features, ends, strict=True)])
    is_concept = torch.tensor([name == victim.concept for name in names]).double()
    x, unseen = (torch.stack(list(itertools.chain.from_iterable(half))) for half in (rows[::2], rows[1::2]))
    y, truth = is_concept.repeat(len(rows[::2])), is_concept.repeat(len(rows[1::2]))
    mean = x.mean(0)
    x, unseen = x - mean, unseen - mean
    # Solve in the dual, because there are fewer rows than columns.
    gram = x @ x.T
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    scores = unseen @ x.T @ torch.linalg.pinv(gram, hermitian=True) @ (y - y.mean())
    return auc(scores[truth > 0], scores[truth == 0])


def base(
    victim: Victim,
    *,
    added: Sequence[float] = (0.5, 1.0),
    encoder_noise: Sequence[float] = (0.05, 0.1),
    clip_skip: Sequence[int] = (1,),
) -> Iterator[Result]:
    """
    Restore the public base's weights in part, read the name off the difference, and change what surrounds the
    denoiser.

    Yields the judges' results
        after adding α (W − W'), the difference to the base; with α = 1 this is the original itself;
        without the denoiser's hooks, if it has any;
        with another text encoder, for which this one with noise on its weights stands, relative to each
        weight's deviation;
        with features from an earlier layer of the text encoder (`clip_skip`);
    and the `rank` of the concept's name among all names of its kind, by how far the difference moves each
    name's feature: 1 means that the weights reveal what was erased.

    Args:
        added (`Sequence[float]`), encoder_noise (`Sequence[float]`), clip_skip (`Sequence[int]`):
            As above.
    """
    prompts = victim.prompts(victim.concept)
    for alpha in added:
        yield victim.drawn(with_base(victim, alpha), prompts, "base", variant=f"base added, alpha {alpha:g}")
    yield Result(rank_of_name(victim), measure="rank")
    pipe = victim.own_denoiser()
    if hooks := hooks_in(pipe.unet):
        for one in hooks:
            one.clear()
        yield victim.drawn(pipe, prompts, "base", variant="hook removed")
    for size in encoder_noise:
        pipe = with_noisy_encoder(victim.pipe, size, victim.seed)
        yield victim.drawn(pipe, prompts, "base", variant=f"another encoder, noise {size:g}")
    for layers in clip_skip:
        features = earlier_features(victim.pipe, prompts, layers)
        yield victim.drawn(victim.pipe, features, "base", variant=f"clip_skip {layers}")


def hooks_in(denoiser: nn.Module) -> list[dict[int, Callable]]:
    """The hooks around the calls of a denoiser and of each of its layers, where there are any."""
    hooks = [found for one in denoiser.modules() for found in (one._forward_pre_hooks, one._forward_hooks)]
    return [found for found in hooks if found]


@torch.no_grad()
def with_base(victim: Victim, alpha: float) -> StableDiffusionPipeline:
    """The pipeline with α times the difference to the original added to every weight of the denoiser."""
    pipe = victim.own_denoiser()
    original = dict(victim.studio.original.unet.named_parameters())
    for name, parameter in pipe.unet.named_parameters():
        parameter.lerp_(original[name].to(parameter), alpha)
    return pipe


def rank_of_name(victim: Victim) -> float | None:
    """
    The rank of the concept's name by ‖(W − W') c‖ / ‖W c‖ among all names of its kind; `None` if the weights
    do not differ.
    """
    W, edited = stacked(victim.studio.original), stacked(victim.pipe)
    if torch.equal(W, edited):
        return None
    names = victim.studio.names(victim.studio.kind(victim.concept))
    encoder = Encoder(victim.studio.original)
    moved = {}
    for name, z in zip(names, encoder.encode(names).double().cpu(), strict=True):
        c = z[1 : len(encoder.token_ids(name)) + 2]
        moved[name] = float((c @ (W - edited).T).norm() / (c @ W.T).norm())
    return float(sorted(moved, key=moved.get, reverse=True).index(victim.concept) + 1)


@torch.no_grad()
def with_noisy_encoder(pipe: StableDiffusionPipeline, size: float, seed: int) -> StableDiffusionPipeline:
    """The pipeline with normal noise on every weight of a text encoder of its own."""
    pipe = copy.copy(pipe)
    text_encoder = copy.deepcopy(pipe.text_encoder)
    generator = torch.Generator().manual_seed(seed)
    for parameter in text_encoder.parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise, alpha=size * float(parameter.std()))
    pipe.register_modules(text_encoder=text_encoder)
    return pipe


@torch.no_grad()
def earlier_features(pipe: StableDiffusionPipeline, prompts: Sequence[str], skipped: int) -> Tensor:
    """
    The features of the text encoder's layer `skipped` before its last, `(n, tokens, d)`.

    They are those of diffusers' `clip_skip`, whose implementation fails with newer text encoders of
    transformers.
    """
    tokens = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(pipe.text_encoder.device)
    hidden = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-1 - skipped]
    modules = pipe.text_encoder.named_modules()
    (norm,) = (module for name, module in modules if name.endswith("final_layer_norm"))
    return norm(hidden)
