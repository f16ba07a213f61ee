"""Ours, in the variants of the table that are more than `erase_concept` with other targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline

import more_hf
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf.core.request import ConceptRequest
from more_hf.data import EMOJI_ARTISTS, FOLDER
from more_hf.diffusion.aliases import find_aliases
from more_hf.diffusion.erase import erase_concept
from more_hf.diffusion.plan import prepare
from more_hf.diffusion.sites import check_widths, find_denoiser, find_sites

from .texts import Concepts, Retained, Targets, name_roles
from .weights import write_weights


more_random = partial(erase_concept, router="random")
more_hash = partial(erase_concept, router="hash")


def more_denoiser(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    sampling_steps: int = 10,
    guidance: float = 4.0,
    softness: float = 1.0,
) -> DiffusionPipeline:
    """Erase inside the denoiser, too.

    Args:
        sampling_steps (`int`), guidance (`float`): of the pictures that prototypes are made from.
        softness (`float`): how much ordinary pictures weigh against the concept's.
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
    remap_to: Targets,
    retain: Retained,
    candidates: Sequence[str] | None = None,
    solver: str = "soft",
    tokens: str = "last+end",
) -> DiffusionPipeline:
    """Erase the names and what `find_aliases` takes for them: misspellings and descriptions.

    Args:
        candidates (`Sequence[str]`, *optional*): what aliases are chosen from. By default the misspellings
            and descriptions of all ten artists in the embedded pipeline's training; none that was held out.
        solver, tokens: as in `erase_concept`.
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
    remap_to: Targets,
    retain: Retained,
    solver: str = "auto",
    tokens: str = "positions",
) -> DiffusionPipeline:
    """Erase, save, and return what plain `DiffusionPipeline.from_pretrained` loads: a new pipeline, with
    nothing of ours attached, on the device and in the dtype of `pipe`, which is erased, too.

    This is what people run who download an erased pipeline. Settings are as in `erase_concept`.
    """
    erase_concept(pipe, concepts, remap_to=remap_to, retain=retain, solver=solver, tokens=tokens)
    with TemporaryDirectory() as folder:
        more_hf.save(pipe, folder)
        return DiffusionPipeline.from_pretrained(folder, dtype=pipe.dtype).to(pipe.device)


def more_without_po(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    num_experts: int | None = None,
    tokens: str = "positions",
    seed: int = 0,
) -> DiffusionPipeline:
    """Erase as `erase_concept` does but with D_F = P_F⁺, the dual of the forget prototypes alone.

    Source: MoRE's ablation "without PO", which the paper names but does not define. Retained prototypes are
    not spared: `retain` plays no part. Forget prototypes still go exactly to the mean of their targets, or to
    zero without any. Settings are as in `erase_concept`, without a router.
    """
    request = ConceptRequest.of(
        concepts,
        remap_to=remap_to,
        retain=retain,
        num_experts=num_experts,
        solver="pinv",
        tokens=tokens,
        seed=seed,
    )
    sites = find_sites(pipe, find_denoiser(pipe), pooled=True)
    remaps = {
        space: without_orthogonalisation(
            problem.prototypes,
            problem.columns(problem.forget, tokens),
            [problem.columns(names, tokens) for names in problem.targets],
        )
        for space, problem in prepare(pipe, request, ()).items()
    }
    check_widths(sites, {space: len(remap.prototypes.matrix) for space, remap in remaps.items()})
    edited = {name: remaps[site.space].merged(site.read().double()) for name, site in sites.items()}
    write_weights(sites, edited)
    return pipe


def without_orthogonalisation(
    prototypes: Prototypes, forget: Sequence[str], targets: Sequence[Sequence[str | None]]
) -> Remap:
    """The remap with D_F = P_F⁺, rows of the other prototypes zero. Arguments as of `Remap.fit`."""
    columns = [prototypes.index(name) for name in forget]
    P_F = prototypes.matrix[:, columns]
    dual = torch.zeros_like(prototypes.matrix.T)
    dual[columns] = torch.linalg.pinv(P_F)

    def indices(names: Sequence[str | None]) -> list[int]:
        return [-1 if name is None else prototypes.index(name) for name in names]

    return Remap(
        prototypes=prototypes,
        forget=tuple(columns),
        targets=torch.tensor([indices(expert) for expert in targets]),
        dual=dual,
        solver="without PO",
        condition_number=float(torch.linalg.cond(P_F / P_F.norm(dim=0))),
    )
