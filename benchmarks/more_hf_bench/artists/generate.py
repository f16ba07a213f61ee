"""Generate images for a list of prompts, reproducibly; which of their names the text encoder can read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence

import torch
from accelerate.utils import tqdm
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from torch import Tensor

import more_hf
from more_hf.diffusion.encoder import Encoder

from ..methods.diffusion.pipelines import progress_bar_config
from .prompts import PromptRow, Prompts


def generate(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 16,
    pictures: Sequence[str] | None = None,
    desc: str | None = None,
) -> torch.Tensor:
    """
    Generate one image per prompt: uint8 `(n, 3, H, W)`, on the CPU. Its noise, and the experts that a router
    draws for it, depend only on its own seed, not on the batch size, the other images or the device. The
    pipeline is not modified.

    `pictures` are for a pipeline with an IP-Adapter: a file per prompt, or an empty name for a prompt alone,
    for which the adapter gets its unconditional input. `desc` stands in front of the progress bar, which is
    shown unless the pipeline's own bar is disabled.

    Raises:
        ValueError: there are no prompts, or not as many seeds as prompts.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"Got {len(prompts)} prompts and {len(seeds)} seeds. Pass one seed per prompt, at least one."
        )
    erasure = more_hf.get_erasure(pipe)
    is_routed = erasure is not None and erasure.router is not None
    has_adapter, picture = takes_pictures(pipe), {}
    if has_adapter:
        batch_size = 1  # diffusers would give all prompts of a batch the same pictures

    images = []
    with _no_inner_bar(pipe) as hidden:
        bar = tqdm(total=len(prompts), desc=desc, unit="image", disable=hidden)
        for start in range(0, len(prompts), batch_size):
            batch_seeds = list(seeds[start : start + batch_size])
            if has_adapter:
                picture = _read_picture(pipe, pictures[start] if pictures else "", guidance)
            with more_hf.routing(pipe, seeds=batch_seeds) if is_routed else contextlib.nullcontext():
                batch = pipe(
                    prompt=list(prompts[start : start + batch_size]),
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch_seeds],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    output_type="pt",
                    **picture,
                ).images
            images.append((batch.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8))
            bar.update(len(batch_seeds))
        bar.close()
    return torch.cat(images)


def takes_pictures(pipe) -> bool:
    """Whether the pipeline has an IP-Adapter, which needs a picture with every prompt."""
    unet = getattr(pipe, "unet", None)
    return unet is not None and getattr(unet.config, "encoder_hid_dim_type", None) == "ip_image_proj"


@torch.no_grad()
def _read_picture(pipe, file: str, guidance: float) -> dict[str, list[Tensor]]:
    """Each adapter's embedding of a picture, `(2, 1, …)`: the unconditional half of guidance comes first."""
    picture = Image.open(file).convert("RGB") if file else Image.new("RGB", (8, 8))
    embeddings = []
    for adapter in pipe.unet.encoder_hid_proj.image_projection_layers:
        hidden = not isinstance(adapter, ImageProjection)
        read, nothing = pipe.encode_image(picture, pipe._execution_device, 1, hidden)
        read = read if file else nothing
        embeddings.append(torch.stack([nothing, read] if guidance > 1 else [read]))
    return {"ip_adapter_image_embeds": embeddings}


@contextlib.contextmanager
def _no_inner_bar(pipe):
    """
    Disable the pipeline's bar over steps inside the block; yield whether its user had disabled it.
    """
    config = progress_bar_config(pipe)
    pipe.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield config.get("disable", False)
    finally:
        pipe.set_progress_bar_config(**config)


def known(encoder: Encoder, names: Iterable[str]) -> list[str]:
    """
    The names with a word that the tokenizer keeps whole. The model cannot have learned much about the others:
    it reads them letter by letter, like any made-up word.
    """
    words = {name: re.findall(r"\w+", name) for name in names}
    return [name for name in words if any(len(encoder.token_ids(word)) == 1 for word in words[name])]


def cut_off(encoder: Encoder, prompts: Prompts) -> list[PromptRow]:
    """The rows whose name ends after the part of the prompt that the text encoder reads."""
    segment = encoder.text.segments[0]
    room = encoder.length - segment.before - segment.ends
    cut = []
    for row in prompts.rows:
        name = prompts.concept(row)
        if not name:
            continue
        # People write the whole name, the part before a colon, or the surname.
        forms = sorted({name, name.split(":")[0], name.split()[-1]}, key=len, reverse=True)
        matches = re.finditer("|".join(map(re.escape, forms)), row.prompt, re.IGNORECASE)
        end = max((match.end() for match in matches), default=0)
        if len(encoder.token_ids(row.prompt[:end])) > room:
            cut.append(row)
    return cut
