"""The lines that every table needs beside the methods: nothing done, noise, and the concept as negative
prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from more_hf.core.errors import MoreError
from more_hf.diffusion.prompts import names_in

from .inference import AtInference
from .roles import Concepts, name_roles


def original(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
) -> DiffusionPipeline:
    """Do nothing: return the pipeline as it is. Every other line is compared with this one."""
    return pipe


def noise(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
) -> AtInference:
    """Return a pipeline that reads noise in place of every prompt that names a concept; `pipe` is not
    modified.

    What a measure says about it is what the measure says about destruction: a large change and nothing of
    what was asked for. Each position keeps the length of its feature; the noise is a function of the prompt.
    `remap_to` and `retain` play no part."""
    return NoisePipeline.around(pipe, forget=name_roles(concepts, remap_to, retain).forget)


def negative_prompt(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
) -> AtInference:
    """Return a pipeline whose negative prompt names the concepts, after the caller's own if there is one;
    `pipe` is not modified.

    Without guidance it does nothing. `remap_to` and `retain` play no part.
    """
    return NegativePromptPipeline.around(pipe, forget=name_roles(concepts, remap_to, retain).forget)


class NoisePipeline(AtInference):
    """See `noise`."""

    def encode_prompt(self, prompt, device, num_images_per_prompt, *args, **kwargs):
        embeds, negative = super().encode_prompt(prompt, device, num_images_per_prompt, *args, **kwargs)
        embeds = embeds.clone()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        for i, text in enumerate(prompts):
            if any(names_in(text, name) for name in self.forget):
                for row in range(i * num_images_per_prompt, (i + 1) * num_images_per_prompt):
                    embeds[row] = noise_like(embeds[row], text)
        return embeds, negative


class NegativePromptPipeline(AtInference):
    """See `negative_prompt`."""

    def encode_prompt(
        self,
        prompt,
        device,
        num_images_per_prompt,
        do_classifier_free_guidance,
        negative_prompt=None,
        **kwargs,
    ):
        if prompt is None:
            raise MoreError(
                "The concepts are added to a negative prompt in words: pass `prompt`, not `prompt_embeds`."
            )
        negative_prompt = with_names(prompt, negative_prompt, self.forget)
        return super().encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, **kwargs
        )


def noise_like(embeds: Tensor, prompt: str) -> Tensor:
    """Gaussian directions for features `(tokens, d)`, a function of the prompt alone, each with the length
    of the feature in its place."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
    directions = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(seed)).to(embeds)
    return directions * embeds.norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True)


def with_names(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, names: Sequence[str]
) -> str | list[str]:
    """The caller's negative prompt or prompts with the names added, as many as there are prompts."""
    added = ", ".join(names)
    if isinstance(prompt, str):
        return f"{negative_prompt}, {added}" if negative_prompt else added
    if negative_prompt is None or isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt or ""] * len(prompt)
    return [f"{text}, {added}" if text else added for text in negative_prompt]
