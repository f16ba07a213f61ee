"""Generate images for a list of prompts, reproducibly."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from accelerate.utils import tqdm

import more_hf
from more_hf.bench.methods.diffusion.progress import progress_bar_config


def generate(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 16,
    desc: str | None = None,
) -> torch.Tensor:
    """
    Generate one image per prompt. The noise of a row, and the experts that a router draws for it, depend on
    the row's own seed only, not on the batch size, the other rows, or the device.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            A text-to-image pipeline. Not modified.
        prompts (`Sequence[str]`):
            One prompt per image.
        seeds (`Sequence[int]`):
            One seed per image.
        steps (`int`):
            Number of denoising steps.
        guidance (`float`):
            Scale of classifier-free guidance; 1 is none.
        batch_size (`int`, *optional*, defaults to 16):
            Images per call of the pipeline.
        desc (`str`, *optional*):
            Text before the progress bar. If the pipeline's own bar is disabled, none is shown here either.

    Returns:
        `torch.Tensor`: uint8 of shape `(n, 3, H, W)`, on the CPU.

    Raises:
        ValueError: if there are no prompts, or not as many seeds as prompts.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"Got {len(prompts)} prompts and {len(seeds)} seeds. Pass one seed per prompt, at least one."
        )
    erasure = more_hf.get_erasure(pipe)
    is_routed = erasure is not None and erasure.router is not None

    images = []
    with _no_inner_bar(pipe) as hidden:
        bar = tqdm(total=len(prompts), desc=desc, unit="image", disable=hidden)
        for start in range(0, len(prompts), batch_size):
            batch_seeds = list(seeds[start : start + batch_size])
            with more_hf.routing(pipe, seeds=batch_seeds) if is_routed else contextlib.nullcontext():
                batch = pipe(
                    prompt=list(prompts[start : start + batch_size]),
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch_seeds],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    output_type="pt",
                ).images
            images.append((batch.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8))
            bar.update(len(batch_seeds))
        bar.close()
    return torch.cat(images)


@contextlib.contextmanager
def _no_inner_bar(pipe):
    """
    Disable the pipeline's bar over steps; yield whether its user had disabled it, and put the setting back.
    """
    config = progress_bar_config(pipe)
    pipe.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield config.get("disable", False)
    finally:
        pipe.set_progress_bar_config(**config)
