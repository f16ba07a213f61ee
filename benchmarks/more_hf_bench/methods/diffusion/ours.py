"""Ours, in the variants of the table that are more than `erase_concept` with other targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory

from diffusers import DiffusionPipeline

import more_hf
from more_hf.data import EMOJI_ARTISTS, FOLDER
from more_hf.diffusion.aliases import find_aliases
from more_hf.diffusion.erase import erase_concept

from .roles import Concepts, name_roles


more_random = partial(erase_concept, router="random")
more_hash = partial(erase_concept, router="hash")


def more_denoiser(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    sampling_steps: int = 10,
    guidance: float = 4.0,
    softness: float = 1.0,
) -> DiffusionPipeline:
    """Erase inside the denoiser, too.

    Args:
        pipe, concepts, remap_to, retain: as in `erase_concept`.
        sampling_steps (`int`), guidance (`float`): of the pictures that prototypes are made from.
        softness (`float`): how much ordinary pictures weigh against the concept's.

    Raises:
        `PrototypeError`, `SiteNotFoundError`, `AlreadyErasedError`: as `erase_concept` does.
    """
    sampling = {"num_inference_steps": sampling_steps, "guidance_scale": guidance}
    return erase_concept(
        pipe,
        concepts,
        remap_to=remap_to,
        retain=retain,
        reach="denoiser",
        softness=softness,
        sampling=sampling,
    )


more_denoiser_soft = partial(more_denoiser, softness=4.0)
more_denoiser_hard = partial(more_denoiser, softness=0.25)


def more_described(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    candidates: Sequence[str] | None = None,
    solver: str = "soft",
    tokens: str = "last+end",
) -> DiffusionPipeline:
    """Erase the names and what `find_aliases` takes for them: misspellings and descriptions.

    Args:
        pipe, concepts, remap_to, retain, solver, tokens: as in `erase_concept`.
        candidates (`Sequence[str]`, *optional*): what aliases are chosen from. By default the misspellings
            and descriptions of all ten artists in the embedded pipeline's training; none that was held out.

    Raises:
        `PrototypeError`, `SiteNotFoundError`, `AlreadyErasedError`: as `erase_concept` and `find_aliases` do.
    """
    roles = name_roles(concepts, remap_to, retain)
    others = [*roles.forget, *roles.keep]
    if candidates is None:
        candidates = trained_descriptions()
        others += EMOJI_ARTISTS
    described = {name: find_aliases(pipe, name, candidates, others=others) for name in roles.forget}
    return erase_concept(pipe, described, remap_to=remap_to, retain=retain, solver=solver, tokens=tokens)


def trained_descriptions() -> list[str]:
    """Every misspelling and description of an artist in the embedded pipeline's captions."""
    artists = json.loads((FOLDER / "emoji_descriptions.json").read_text("utf-8"))["artists"]
    return [said for kinds in artists.values() for said_so in kinds.values() for said in said_so["trained"]]


def more_reloaded(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    solver: str = "auto",
    tokens: str = "positions",
) -> DiffusionPipeline:
    """Erase, save, and return what plain `DiffusionPipeline.from_pretrained` loads: a new pipeline, with
    nothing of ours attached.

    This is what people run who download an erased pipeline. On the device and in the dtype of `pipe`, which
    is erased, too.

    Args:
        pipe, concepts, remap_to, retain, solver, tokens: as in `erase_concept`.

    Raises:
        `PrototypeError`, `SiteNotFoundError`, `AlreadyErasedError`: as `erase_concept` does.
    """
    erase_concept(pipe, concepts, remap_to=remap_to, retain=retain, solver=solver, tokens=tokens)
    with TemporaryDirectory() as folder:
        more_hf.save(pipe, folder)
        return DiffusionPipeline.from_pretrained(folder, dtype=pipe.dtype).to(pipe.device)
