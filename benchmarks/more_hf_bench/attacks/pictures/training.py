"""The common parts of attacks that train: the denoiser's own loss, and new tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn


class Noised(NamedTuple):
    """
    Noised latents `x`, their timesteps `t` `(n,)`, and the output that the denoiser was trained to give.
    """

    x: Tensor
    t: Tensor
    wanted: Tensor


class Noise:
    """
    Noises latents as in the denoiser's training.

    Args:
        pipe (`StableDiffusionPipeline`):
            The pipeline, for its schedule and its kind of prediction.
        seed (`int`):
            Seed of everything random here; no global random state is touched.
    """

    def __init__(self, pipe: StableDiffusionPipeline, seed: int):
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, count: int, batch_size: int) -> Tensor:
        """Random numbers below `count`, `(batch_size,)`; without repeats if there are enough."""
        if count >= batch_size:
            return torch.randperm(count, generator=self.generator)[:batch_size]
        return torch.randint(count, (batch_size,), generator=self.generator)

    def __call__(self, latents: Tensor, t: Tensor | None = None) -> Noised:
        """Noise latents at random timesteps, or at `t`."""
        if t is None:
            t = torch.randint(len(self.scheduler.alphas_cumprod), (len(latents),), generator=self.generator)
        noise = torch.randn(latents.shape, generator=self.generator).to(latents)
        t = t.to(latents.device)
        wanted = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            wanted = self.scheduler.get_velocity(latents, noise, t)
        return Noised(self.scheduler.add_noise(latents, noise, t), t, wanted)

    def error(self, predicted: Tensor, noised: Noised) -> Tensor:
        """
        The mean square error of the predicted noise, whatever the kind of prediction.

        With x = √ᾱ x_0 + √(1 − ᾱ) ε, an error of v is an error of ε divided by √ᾱ.
        """
        squares = (predicted - noised.wanted).square().flatten(1).mean(1)
        if self.scheduler.config.prediction_type == "v_prediction":
            squares = squares * self.scheduler.alphas_cumprod.to(squares)[noised.t]
        return squares.mean()


def encode(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """The text features that the denoiser reads `(n, tokens, d)`, with gradients if they are enabled."""
    return pipe.encode_prompt(list(prompts), pipe.unet.device, 1, False)[0]


def with_new_tokens(pipe: StableDiffusionPipeline, count: int) -> tuple[StableDiffusionPipeline, str]:
    """A copy of the pipeline whose text encoder knows `count` new tokens, and these tokens as text."""
    pipe = copy.copy(pipe)
    tokenizer, text_encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    words = [f"<new-{i}>" for i in range(count)]
    tokenizer.add_tokens(words)
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    pipe.register_modules(tokenizer=tokenizer, text_encoder=text_encoder.requires_grad_(False))
    return pipe, " ".join(words)


@contextmanager
def embedded(pipe: StableDiffusionPipeline, vectors: Tensor) -> Iterator[None]:
    """
    Inside the block, the last tokens of the vocabulary are embedded as `vectors`, with gradients: `(count,
    d)`, or `(n, count, d)` with different ones for each of n prompts.
    """
    embedding: nn.Embedding = pipe.text_encoder.get_input_embeddings()
    first = embedding.num_embeddings - vectors.shape[-2]

    def replace_new(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        ids = args[0]
        of_each = vectors.expand(len(ids), *vectors.shape[-2:])
        new = of_each.gather(1, (ids - first).clamp(0)[..., None].expand(*ids.shape, vectors.shape[-1]))
        return torch.where((ids >= first)[..., None], new.to(output), output)

    handle = embedding.register_forward_hook(replace_new)
    try:
        yield
    finally:
        handle.remove()
