"""Latent inversion: find the starting noise that draws one of the original's pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ..result import Result, mean_of
from .noise import NoisyDDIM
from .studio import Pictures
from .training import encode
from .victim import Victim


def latent(victim: Victim, *, pictures: int = 10, steps: int = 20, fixed_point: int = 3) -> Iterator[Result]:
    """
    Invert pictures of the concept and of others with the erased pipeline, and draw them again.

    Yields, for the forgotten concept and for remaining ones, the peak signal-to-noise ratio of the
    reproduction in dB (`psnr`, against the VAE's reconstruction), and the mean log-likelihood of the noise
    per dimension (`log-likelihood`; −1.42 for normal noise): a concept that is gone would need noise that is
    never drawn.

    Source: Memories of Forgotten Concepts (Rusanovsky et al., CVPR 2025), with DDIM inversion and fixed-point
    steps in place of its inversion.

    Args:
        victim (`Victim`):
            The pipeline under attack.
        pictures (`int`):
            Number of pictures of the concept, and of others.
        steps (`int`), fixed_point (`int`):
            DDIM steps, and how often each step of the inversion is corrected.
    """
    studio = victim.studio
    collections = {
        "forgotten": studio.pictures(victim.concept, pictures),
        "remaining": studio.others(victim.concept, pictures),
    }
    for variant, shown in collections.items():
        noise, again = reproduce(victim.pipe, shown, victim.concept, steps=steps, fixed_point=fixed_point)
        truth = decode(victim.pipe, shown.latents)
        error = (decode(victim.pipe, again) - truth).square().flatten(1).mean(1)
        psnr = (-10 * error.log10()).tolist()
        likelihood = (-noise.square() / 2).flatten(1).mean(1) - math.log(2 * math.pi) / 2
        for measure, values in (("psnr", psnr), ("log-likelihood", likelihood.tolist())):
            recovered, low, high = mean_of(values, [0])
            yield Result(recovered, measure=measure, variant=variant, low=low, high=high)


@torch.no_grad()
def reproduce(
    pipe: StableDiffusionPipeline, pictures: Pictures, name: str, *, steps: int, fixed_point: int
) -> tuple[Tensor, Tensor]:
    """The starting noise of each picture, and the latents that are drawn from it without guidance."""
    scheduler = NoisyDDIM.of(pipe, eta=0.0, variance_scale=1.0)
    scheduler.set_timesteps(steps, device=pipe.unet.device)
    features = encode(pipe, pictures.texts(name))
    x = pictures.latents.to(features)

    def split(t: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        return scheduler.split(pipe.unet(sample, t, features).sample, t, sample)

    for t in scheduler.timesteps.flip(0):
        # Undo the step from x' to x. It depends on the denoiser's output for the unknown x', so iterate.
        before, after = scheduler.levels(t)
        x_before = x
        for _ in range(1 + fixed_point):
            _, noise = split(t, x_before)
            clean = (before / after).sqrt() * (x - (1 - after).sqrt() * noise)  # √ᾱ x_0 at the level before
            x_before = clean + (1 - before).sqrt() * noise
        x = x_before
    start = x
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t, features).sample, t, x).prev_sample
    return start.float().cpu(), x.float().cpu()


@torch.no_grad()
def decode(pipe: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Pictures in [0, 1], float32 `(n, 3, H, W)`."""
    vae = pipe.vae
    pixels = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
    return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1)
