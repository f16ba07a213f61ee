"""Draw pictures from prompts, each from its own seed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..core.errors import SiteNotFoundError


def call(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Mapping[str, Any],
    output_type: str,
) -> Any:
    """
    What the pipeline returns for prompts, each with its own seed.

    Raises:
        `SiteNotFoundError`: the pipeline cannot draw from a prompt and these arguments alone.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        return pipe(prompt=list(prompts), generator=generators, output_type=output_type, **sampling)
    # an image-to-image pipeline, an argument it does not take, or more positions than it has embeddings
    except (TypeError, ValueError, IndexError) as error:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} cannot draw from a prompt and `sampling` alone ({error}). Erase from the "
            "model's text-to-image pipeline and pass its components on, or correct `sampling`."
        ) from error


def draw(
    pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], sampling: Mapping[str, Any]
) -> Tensor:
    """
    Draw one batch of pictures, one for each prompt: uint8 `(n, 3, H, W)`, on the CPU. The pipeline is not
    modified, and its safety checker, which would turn pictures black, is not asked.

    Raises:
        `SiteNotFoundError`: the pipeline cannot draw pictures from a prompt and these arguments alone.
    """
    silent = copy.copy(pipe)
    silent.set_progress_bar_config(disable=True)
    if getattr(silent, "safety_checker", None) is not None:
        silent.register_modules(safety_checker=None)
    pictures = getattr(call(silent, prompts, seeds, sampling, "pt"), "images", None)
    if pictures is None:
        raise SiteNotFoundError(f"{type(pipe).__name__} draws no pictures. Pass a text-to-image pipeline.")
    return (pictures.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
