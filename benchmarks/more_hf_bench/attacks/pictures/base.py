"""Attacks with the files alone: add the public base, remove the hook, change the text encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from more_hf.diffusion.encoder import Encoder

from ..result import Result
from .closed_form import stacked
from .victim import Victim


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
        victim (`Victim`):
            The pipeline under attack.
        added (`Sequence[float]`), encoder_noise (`Sequence[float]`), clip_skip (`Sequence[int]`):
            As above.
    """
    prompts = victim.prompts(victim.concept)
    for alpha in added:
        yield victim.drawn(with_base(victim, alpha), prompts, "base", variant=f"base added, alpha {alpha:g}")
    yield Result(rank_of_name(victim), measure="rank")
    if victim.pipe.unet._forward_pre_hooks:
        pipe = victim.own_denoiser()
        pipe.unet._forward_pre_hooks.clear()
        yield victim.drawn(pipe, prompts, "base", variant="hook removed")
    for size in encoder_noise:
        pipe = with_noisy_encoder(victim.pipe, size, victim.seed)
        yield victim.drawn(pipe, prompts, "base", variant=f"another encoder, noise {size:g}")
    for layers in clip_skip:
        features = earlier_features(victim.pipe, prompts, layers)
        yield victim.drawn(victim.pipe, features, "base", variant=f"clip_skip {layers}")


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
