"""Ours, in the variants of the table that are more than `erase_concept` with other targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline

import more_hf
from more_hf.core.errors import MoreError
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import NOWHERE, Remap
from more_hf.core.request import EXACT_SOLVERS, ConceptRequest, check_choice
from more_hf.data import EMOJI_ARTISTS, FOLDER
from more_hf.diffusion.aliases import find_aliases
from more_hf.diffusion.encoder import Encoder
from more_hf.diffusion.erase import erase_concept
from more_hf.diffusion.plan import prepare
from more_hf.diffusion.sites import check_widths, find_denoiser, find_sites

from .closed_form import adversarial_rounds
from .pipelines import require_stable_diffusion
from .texts import Concepts, Retained, Targets, Texts, guides, name_roles
from .weights import text_sites, write_weights


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
    reach: str = "denoiser",
) -> DiffusionPipeline:
    """Erase inside the denoiser, too.

    Args:
        sampling_steps (`int`), guidance (`float`): of the pictures that prototypes or gates are made from.
        softness (`float`): how much ordinary pictures weigh against the concept's.
        reach (`str`): `"denoiser"` or `"gates"`.
    """
    sampling = {"num_inference_steps": sampling_steps, "guidance_scale": guidance}
    return erase_concept(
        pipe,
        concepts,
        remap_to=remap_to,
        retain=retain,
        reach=reach,
        softness=softness,
        sampling=sampling,
    )


more_denoiser_soft = partial(more_denoiser, softness=4.0)
more_denoiser_hard = partial(more_denoiser, softness=0.25)
more_gates = partial(more_denoiser, reach="gates")
more_gates_soft = partial(more_gates, softness=2.0)


def more_denoiser_rece(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    epochs: int = 1,
    rho: float = 1e-3,
    lamb: float = 0.1,
    preserve_scale: float = 0.1,
    sampling_steps: int = 10,
    guidance: float = 4.0,
) -> DiffusionPipeline:
    """Erase inside the denoiser; then edit the embeddings that keys and values still take for the concept.

    For Stable Diffusion. Settings are those of `more_denoiser`, and of the rounds of `rece`.
    """
    require_stable_diffusion(pipe)
    texts, roles = Texts(pipe), name_roles(concepts, remap_to, retain)
    sites = text_sites(pipe, "kv", texts.prompts([""]).shape[-1])
    original = {name: site.read().double().cpu() for name, site in sites.items()}
    more_denoiser(
        pipe, concepts, remap_to=remap_to, retain=retain, sampling_steps=sampling_steps, guidance=guidance
    )
    # The name's edit of these layers is W A, with one matrix A for all of them.
    W = torch.cat(list(original.values()))
    A = torch.linalg.lstsq(W, torch.cat([site.read().double().cpu() for site in sites.values()])).solution
    rounds = {"epochs": epochs, "rho": rho, "lamb": lamb, "preserve_scale": preserve_scale}
    A = adversarial_rounds(texts, roles, guides(roles, None), W.T @ W, A, **rounds)
    write_weights(sites, {name: (before @ A).to(pipe.device) for name, before in original.items()})
    return pipe


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


def more_paper(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    num_experts: int | None = None,
    tokens: str = "positions",
    seed: int = 0,
) -> DiffusionPipeline:
    """Erase as the paper prints it: D = P⁺, and a random router over experts with drawn targets.

    Source: MoRE, Algorithms 1 and 2. Every name to keep is in P, and each expert sends each concept to one of
    them, target or retained name, drawn uniformly: two experts may draw the same. The paper says neither how
    many experts its pictures have nor which tokens make prototypes; the begin token and the empty prompt are
    in P, too, as in every edit of this package.

    Args:
        num_experts (`int`, *optional*): by default one for each name to keep.
        tokens, seed: as in `erase_concept`.
    """
    roles = name_roles(concepts, remap_to, retain)
    if not roles.keep:
        raise MoreError("Targets are drawn among the names to keep, and there are none. Give some.")
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in ConceptRequest.of(concepts, remap_to=None).concepts:
        choice = torch.randint(len(roles.keep), (num_experts or len(roles.keep),), generator=generator)
        drawn[name] = [roles.keep[i] for i in choice]
    return erase_concept(
        pipe,
        concepts,
        remap_to=drawn,
        retain=roles.keep,
        num_experts=num_experts or len(roles.keep),
        router="random",
        solver="pinv",
        tokens=tokens,
        seed=seed,
    )


more_pinv = partial(erase_concept, solver="pinv")
more_covariance = partial(erase_concept, solver="covariance")


def more_without_po(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    num_experts: int | None = None,
    tokens: str = "positions",
    seed: int = 0,
    solver: str = "pinv",
) -> DiffusionPipeline:
    """Erase as `erase_concept` does but with the dual of the forget prototypes alone.

    Source: MoRE's ablation "without PO", which the paper names but does not define. Forget prototypes still
    go exactly to the mean of their targets, or to zero without any; no other prototype is held. With the
    metrics `"pinv"` (D_F = P_F⁺, where `retain` plays no part) and `"covariance"` (retained names are in Σ),
    it is one half of a 2 × 2 whose other half is `more_pinv` and `more_covariance`.

    Settings are as in `erase_concept`, without a router.
    """
    request = ConceptRequest.of(
        concepts,
        remap_to=remap_to,
        retain=retain,
        num_experts=num_experts,
        solver=solver,
        tokens=tokens,
        seed=seed,
    )
    sites = find_sites(pipe, find_denoiser(pipe), pooled=True)
    remaps = {}
    for space, problem in prepare(Encoder.of(pipe, request), request).items():
        forget = problem.columns(request.surfaces, tokens)
        targets = [problem.columns(names, tokens) for names in problem.targets]
        remaps[space] = without_orthogonalization(problem.prototypes, forget, targets, solver=solver)
    check_widths(sites, {space: len(remap.prototypes.matrix) for space, remap in remaps.items()})
    write_weights(
        sites, {name: remaps[site.space].merged(site.read().double()) for name, site in sites.items()}
    )
    return pipe


more_without_po_covariance = partial(more_without_po, solver="covariance")


def without_orthogonalization(
    prototypes: Prototypes,
    forget: Sequence[str],
    targets: Sequence[Sequence[str | None]],
    *,
    solver: str = "pinv",
    shrinkage: float = 1e-4,
) -> Remap:
    """The remap with D_F = (P_Fᵀ Σ⁻¹ P_F)⁻¹ P_Fᵀ Σ⁻¹, rows of the other prototypes zero. Arguments as of
    `Remap.fit`."""
    check_choice("solver", solver, EXACT_SOLVERS)
    columns = [prototypes.index(name) for name in forget]
    P_F = prototypes.matrix[:, columns]
    dual = torch.zeros_like(prototypes.matrix.T)
    if solver == "pinv":
        dual[columns] = torch.linalg.pinv(P_F)
    else:
        whiten = prototypes.moment.inverse_root(shrinkage)
        dual[columns] = whiten(torch.linalg.pinv(whiten(P_F)).T).T
    numbers = {name: column for column, name in enumerate(prototypes.names)} | {None: NOWHERE}
    return Remap(
        prototypes=prototypes,
        forget=tuple(columns),
        targets=torch.tensor([[numbers[name] for name in expert] for expert in targets]),
        dual=dual,
        solver=f"{solver} without PO",
        condition_number=float(torch.linalg.cond(P_F / P_F.norm(dim=0))),
    )
