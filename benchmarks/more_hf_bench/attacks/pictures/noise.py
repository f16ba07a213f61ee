"""The noise probe: the same prompts, sampled with more noise than usual."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..result import Result
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
    Draw every test prompt once for each η and scale of the variance, and keep the best picture.

    The judge itself chooses the best, like somebody who tries that often and looks. Source: When Are Concepts
    Erased From Diffusion Models? (Lu et al., NeurIPS 2025), its noise-based probe.

    Args:
        victim (`Victim`):
            The pipeline under attack.
        eta (`Sequence[float]`), variance_scale (`Sequence[float]`):
            All pairs are tried.
        budgets (`Sequence[int]`):
            Numbers of samplings after which the best pictures are counted.
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
