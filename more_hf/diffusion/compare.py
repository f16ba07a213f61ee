"""`compare` for pipelines: the same prompts and noise before and after an erasure, as one picture."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..core.errors import MoreError
from ..core.request import ConceptRequest, read_names
from .erase import get_erasure
from .grid import draw_grid
from .sites import as_pipeline


logger = logging.getLogger(__name__)

MOST_COLUMNS = 6  # further prompts stand below
READABLE = 128  # pixels; smaller pictures are enlarged, so that there is room for their prompts


def compare(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    show_original: Callable[[], AbstractContextManager[DiffusionPipeline | None]],
    seeded: Callable[[DiffusionPipeline, Sequence[int]], AbstractContextManager[Any]],
    seed: int = 0,
    **kwargs: Any,
) -> Image.Image:
    """
    `more_hf.compare` for pipelines.

    `show_original` gives a block and in it the pipeline that draws as the original, or `None`; `seeded` one
    in which a pipeline's router depends on the seeds alone.
    """
    prompts = read_names("prompts", prompts)
    if not prompts:
        raise MoreError("`prompts` is empty. Pass at least one prompt.")

    def draw(source: DiffusionPipeline, prompts: Sequence[str | None]) -> list[Image.Image | None]:
        """One picture per prompt, each by a call of its own, so that any number fits into memory."""
        source = as_pipeline(source)
        pictures: list[Image.Image | None] = []
        for number, prompt in enumerate(prompts, start=seed):
            if prompt is None:
                pictures.append(None)
                continue
            with seeded(source, [number]):
                generator = torch.Generator("cpu").manual_seed(number)
                pictures += source(prompt, generator=generator, output_type="pil", **kwargs).images[:1]
        return pictures

    erasure = get_erasure(pipe)
    after = draw(pipe, prompts)
    rows, title = {"after": after}, "before and after"
    if erasure is not None:
        title = f"{', '.join(erasure.concepts)} erased"
    with show_original() as source:
        if source is None:
            title += ": the original is not here"
            logger.warning(
                "The original weights are not here, so that only `after` is drawn. Pass `original=`, the "
                "pipeline before the erasure (%s), for the other rows.",
                erasure.facts.base or "its record does not say which",
            )
        else:
            rows = {"before": draw(source, prompts), "after": after}
            wanted = []
            if erasure is not None:
                wanted = [target_prompt(prompt, erasure.request) for prompt in prompts]
            # a row of targets where at least one prompt has a single right one
            if any(wanted):
                rows["target"] = draw(source, wanted)
    scale = -(-READABLE // after[0].width)
    return draw_grid(rows, column_labels=prompts, scale=scale, title=title, most_columns=MOST_COLUMNS)


def target_prompt(prompt: str, request: ConceptRequest) -> str | None:
    """
    The prompt that asks for the targets of the forgotten names in it; `None` if there is no single right one:
    it has no such name, or one without a target or with several.
    """
    # an alias goes where its concept does
    targets = {}
    for name, aliases in request.named.items():
        for form in (name, *aliases):
            targets[form.casefold()] = request.remap_to[name]
    # Of names that start alike the longest is meant.
    forms = "|".join(re.escape(form) for form in sorted(targets, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{forms})(?!\w)", re.IGNORECASE)
    named = [targets[form.casefold()] for form in pattern.findall(prompt)]
    if not named or any(len(names) != 1 for names in named):
        return None
    return pattern.sub(lambda found: targets[found[0].casefold()][0], prompt)
