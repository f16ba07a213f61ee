"""Ours without prototype orthogonalisation: the dual of the forget prototypes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf.core.request import ConceptRequest
from more_hf.diffusion.plan import prepare
from more_hf.diffusion.sites import check_widths, find_denoiser, find_sites

from .roles import Concepts
from .weights import write_weights


def more_without_po(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    num_experts: int | None = None,
    tokens: str = "positions",
    seed: int = 0,
) -> DiffusionPipeline:
    """Erase concepts as `erase_concept` does but with D_F = P_F⁺, the dual of the forget prototypes alone.
    In place; returns the pipeline.

    Source: MoRE's ablation "without PO", which the paper names but does not define. Retained prototypes are
    not spared: `retain` plays no part. Forget prototypes still go exactly to the mean of their targets, or
    to zero without any.

    Args:
        pipe, concepts, remap_to, retain, num_experts, tokens, seed: as in `erase_concept`, without a router.

    Raises:
        `PrototypeError`, `SiteNotFoundError`: as `erase_concept` does.
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
