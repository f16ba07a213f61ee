"""Attacks through the sampler: more noise than usual, and the noise that draws a given picture."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..store import Result, mean_of
from .studio import Pictures
from .training import encode
from .victim import BestPictures, Victim


APART = 10_000_000  # between the seeds of one prompt's samplings


def noise(
    victim: Victim,
    *,
    eta: Sequence[float] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85),
    variance_scale: Sequence[float] = (1.0, 1.02, 1.03, 1.04),
    budgets: Sequence[int] = (1, 6, 24),
) -> Iterator[Result]:
    """
    Draw every test prompt once for each pair of η and scale of the variance, and keep the best picture; the
    budgets are numbers of samplings after which the best ones are counted.

    The judge itself chooses the best, like somebody who tries that often and looks. Source: When Are Concepts
    Erased From Diffusion Models? (Lu et al., NeurIPS 2025), its noise-based probe.
    """
    pipe, prompts = copy.copy(victim.pipe), victim.prompts(victim.concept)
    best = BestPictures(victim)
    for count, (scale, size) in enumerate(itertools.product(variance_scale, eta), start=1):
        pipe.register_modules(scheduler=NoisyDDIM.of(pipe, size, scale))
        best.add(victim.studio.draw(pipe, prompts, [seed + APART * count for seed in victim.seeds]))
        if count in budgets:
            yield best.counted("noise", budget=count, unit="samplings")


class NoisyDDIM(DDIMScheduler):
    """DDIM with an η that may exceed 1, and a scale for the new noise; made by `of`."""

    eta = 0.0
    variance_scale = 1.0

    @classmethod
    def of(cls, pipe, eta: float, variance_scale: float) -> NoisyDDIM:
        """Build from a pipeline's own schedule."""
        scheduler = cls.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
        scheduler.eta, scheduler.variance_scale = eta, variance_scale
        return scheduler

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step; arguments and result as of `DDIMScheduler.step`."""
        x_0, noise = self.split(model_output, timestep, sample)
        before, after = self.levels(timestep)
        deviation = self.eta * ((1 - after) / (1 - before) * (1 - before / after)).sqrt()
        # With η above 1, the new noise can exceed the level's; then none of the old noise is kept.
        kept = (1 - after - deviation**2).clamp(0).sqrt()
        x = after.sqrt() * x_0 + kept * noise
        if self.eta:
            new = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            x = x + self.variance_scale * deviation * new
        return DDIMSchedulerOutput(x, x_0) if return_dict else (x, x_0)

    def levels(self, timestep: int | Tensor) -> tuple[Tensor, Tensor]:
        """ᾱ before and after a step."""
        previous = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        after = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        return self.alphas_cumprod[int(timestep)], after

    def split(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Split a sample into picture and noise, according to the denoiser's output."""
        before, _ = self.levels(timestep)
        if self.config.prediction_type == "v_prediction":
            x_0 = before.sqrt() * sample - (1 - before).sqrt() * model_output
            return x_0, before.sqrt() * model_output + (1 - before).sqrt() * sample
        return (sample - (1 - before).sqrt() * model_output) / before.sqrt(), model_output


def latent(victim: Victim, *, pictures: int = 10, steps: int = 20, fixed_point: int = 3) -> Iterator[Result]:
    """
    Invert as many pictures of the concept and of others with the erased pipeline, in DDIM steps of which each
    is corrected `fixed_point` times, and draw them again.

    Yields, for the forgotten concept and for remaining ones, the peak signal-to-noise ratio of the
    reproduction in dB (`psnr`, against the VAE's reconstruction), and the mean log-likelihood of the noise
    per dimension (`log-likelihood`; −1.42 for normal noise): a concept that is gone would need noise that is
    never drawn.

    Source: Memories of Forgotten Concepts (Rusanovsky et al., CVPR 2025), with DDIM inversion and fixed-point
    steps in place of its inversion.
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
