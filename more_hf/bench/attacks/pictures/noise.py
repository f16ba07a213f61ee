"""The noise probe: the same prompts, sampled with more noise than they should be."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..result import Result
from .victim import Victim


APART = 10_000_000  # between the seeds of one prompt's samplings


def noise(
    victim: Victim,
    *,
    eta: Sequence[float] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85),
    variance_scale: Sequence[float] = (1.0, 1.02, 1.03, 1.04),
    budgets: Sequence[int] = (1, 6, 24),
) -> Iterator[Result]:
    """Draw every test prompt once for each η and scale of the variance, and keep the best picture.

    The judge itself chooses: this is what somebody finds who tries so often and looks. Source: When Are
    Concepts Erased From Diffusion Models? (Lu et al., NeurIPS 2025), its noise-based probe.

    Args:
        victim (`Victim`): the pipeline.
        eta (`Sequence[float]`), variance_scale (`Sequence[float]`): all pairs are tried.
        budgets (`Sequence[int]`): numbers of samplings after which the best are counted.
    """
    pipe, prompts = copy.copy(victim.pipe), victim.prompts(victim.concept)
    found, best = [False] * len(prompts), None
    pairs = [(e, s) for s in variance_scale for e in eta]
    for count, pair in enumerate(pairs, start=1):
        pipe.register_modules(scheduler=NoisyDDIM.of(pipe, *pair))
        images = victim.studio.draw(pipe, prompts, [seed + APART * count for seed in victim.seeds])
        seen = victim.studio.shows(images, victim.rows, victim.concept)
        best = images if best is None else best
        for i, hit in enumerate(seen):
            if hit and not found[i]:
                found[i], best[i] = True, images[i]
        if count in budgets:
            yield victim.counted(found, best, "noise", budget=count, unit="samplings")


class NoisyDDIM(DDIMScheduler):
    """DDIM with an η that may be above 1 and a scale of the new noise; made by `of`."""

    eta = 0.0
    variance_scale = 1.0

    @classmethod
    def of(cls, pipe, eta: float, variance_scale: float) -> NoisyDDIM:
        """The pipeline's own schedule, sampled like this."""
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
        # With η above 1 there can be more new noise than the level has: none of the old is kept then.
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
        """The picture and the noise that the denoiser's output says the sample is made of."""
        before, _ = self.levels(timestep)
        if self.config.prediction_type == "v_prediction":
            x_0 = before.sqrt() * sample - (1 - before).sqrt() * model_output
            return x_0, before.sqrt() * model_output + (1 - before).sqrt() * sample
        return (sample - (1 - before).sqrt() * model_output) / before.sqrt(), model_output
