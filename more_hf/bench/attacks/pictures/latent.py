"""Latent inversion: which starting noise draws a picture of the original?"""

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
    """Invert pictures of the concept and of others with the erased pipeline, and draw them again.

    Yields, for the forgotten concept and for remaining ones, the peak signal-to-noise ratio of the
    reproduction in dB (`psnr`, against what the VAE makes of the picture), and the mean log-likelihood of the
    noise per dimension (`log-likelihood`; −1.42 of noise that is normal): a concept that is gone would need
    noise that nobody draws.

    Source: Memories of Forgotten Concepts (Rusanovsky et al., CVPR 2025), with DDIM inversion and fixed-point
    steps in the place of its inversion.

    Args:
        victim (`Victim`): the pipeline.
        pictures (`int`): of each of the two.
        steps (`int`), fixed_point (`int`): of DDIM, and how often each step of the inversion is corrected.
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
        # The step from x' to x has to be undone, with what the denoiser says of x', which is sought.
        before, after = scheduler.levels(t)
        sought = x
        for _ in range(1 + fixed_point):
            _, noise = split(t, sought)
            sought = (before / after).sqrt() * (x - (1 - after).sqrt() * noise) + (1 - before).sqrt() * noise
        x = sought
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
