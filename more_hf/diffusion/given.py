"""Given pictures as the pipeline's latents: read, cut to the size that it draws, and encoded by its VAE."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

from ..core.errors import PrototypeError, SiteNotFoundError
from ..core.pictures import Pictures
from .prompts import sentences_around


def check_vae(pipe: DiffusionPipeline) -> None:
    """Raises `SiteNotFoundError` if the pipeline has no VAE that is known to encode pictures."""
    vae = getattr(pipe, "vae", None)
    known = isinstance(vae, AutoencoderKL | AutoencoderDC) and hasattr(vae, "encoder")
    # SDXL's pipeline has another formula where the VAE's configuration has these
    if not known or getattr(vae.config, "latents_mean", None) is not None:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} has {'no VAE' if vae is None else f'a {type(vae).__name__}'}, and how to "
            "encode pictures for it is not known. Load the pipeline with its AutoencoderKL or "
            "AutoencoderDC, or name the concept, of which it draws pictures itself."
        )


def encode_pictures(pipe: DiffusionPipeline, given: Pictures, size: Sequence[int]) -> Tensor:
    """
    The latents of given pictures, cut to a size (height, width) around their center: the mean of the VAE's
    distribution, scaled as the pipeline's loop has them. The pipeline is not changed.

    Raises:
        `PrototypeError`: a file is no picture.
    """
    vae, latents = pipe.vae, []
    processor = VaeImageProcessor(vae_scale_factor=1)  # any size is right
    pack = getattr(pipe, "_pack_latents", None)  # of FLUX: patches in a row
    # as in diffusers, a VAE whose activations exceed half precision runs in float32 meanwhile
    dtype, upcast = vae.dtype, vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        for file in given.captions():  # one by one, since a VAE's activations are large
            pixels = processor.preprocess(read_picture(file), *size, resize_mode="crop")
            encoded = vae.encode(pixels.to(pipe._execution_device, vae.dtype))
            z = encoded.latent_dist.mode() if isinstance(vae, AutoencoderKL) else encoded.latent
            z = (z - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
            latents.append(z if pack is None else pack(z, *z.shape))
    finally:
        if upcast:
            vae.to(dtype)
    return torch.cat(latents)


def read_picture(file: Path) -> Image.Image:
    """A picture in RGB, upright, on white where it is transparent. Raises `PrototypeError` if it is none."""
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise PrototypeError(
            f"{file} cannot be read as a picture ({error}). Remove it from the folder, or save it again."
        ) from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def shown_sentences(given: Pictures, count: int) -> list[str]:
    """
    The caption of each of `count` given pictures, which take turns, with `{}` in place of the name; empty
    without a caption.
    """
    names = [] if given.name is None else [given.name]
    lines = []
    for caption, _ in zip(cycle(given.captions().values()), range(count), strict=False):
        lines.append(next(iter(sentences_around(names, [caption])), caption))
    return lines


def drawn_sentences(given: Pictures, ordinary: Sequence[str]) -> list[str]:
    """
    What a target's pictures are drawn from, with `{}` for its name: the captions, as many as there are
    ordinary sentences, which stand in for those that are missing.
    """
    lines = []
    for caption, sentence in zip(shown_sentences(given, len(ordinary)), ordinary, strict=True):
        lines.append(caption if "{}" in caption else f"{caption}, {{}}" if caption else sentence)
    return lines
