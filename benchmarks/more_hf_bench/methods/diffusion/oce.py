"""OCE: Orthogonal Concept Erasure (ICML 2026)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from more_hf.diffusion.encoder import fit_prototypes

from .roles import Concepts, guides, name_roles, ordinary_prompts
from .texts import Texts, expanded
from .weights import text_sites, write_weights


def oce(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    guide: str | None = None,
    erase_scale: float = 500.0,
    retain_scale: float = 1.0,
    global_scale: float = 10.0,
    lamb: float = 10.0,
    expand: str | None = "art",
    layers: str = "v",
) -> DiffusionPipeline:
    """Erase concepts by rotating each value layer's outputs: W becomes Q W with Q orthogonal. In place;
    returns the pipeline.

    Source: OCE, its orthogonal Procrustes problem; settings of its style script. The second moment of
    ordinary text is over the package's everyday prompts without the begin token (published: COCO-30k
    captions).

    Args:
        pipe, concepts, remap_to: as in `erase_concept`. Several targets span the guide subspace together.
        retain (`Sequence[str]`, *optional*): names to keep, besides the targets.
        guide (`str`, *optional*): what the concepts become, if not `remap_to`. Without both: `"art"`.
        erase_scale, retain_scale, global_scale, lamb (`float`): weights of the erasure, of the retained
            names, of ordinary text and of the layer as it is (published: 500, 1, 10, 10 for styles; 800, 2,
            70, 10 for 100 celebrities).
        expand (`str`, *optional*): `"art"` or `"object"` adds five prompts per name; `None` adds none.
        layers (`str`, defaults to `"v"`): `"v"`, `"k"` or `"kv"`.

    Raises:
        `PrototypeError`, `SiteNotFoundError`: as `erase_concept` does, the latter also for a denoiser that
            reads T5.
    """
    roles, texts = name_roles(concepts, remap_to, retain), Texts(pipe)
    C = torch.cat([texts.last_tokens(expanded(name, expand)) for name in roles.forget])
    G = torch.cat([texts.last_tokens(expanded(name, expand)) for name in guides(roles, guide)])
    R = texts.last_tokens(roles.keep)
    # What must stay, weighted: retained names, ordinary text, and the layer itself.
    ordinary = dict.fromkeys(ordinary_prompts(pipe, roles.forget), 1)
    moment = fit_prototypes(pipe, [], "last", sigma_prompts=ordinary)["tokens"].moment.dense
    keep = retain_scale * R.T @ R + global_scale * moment + lamb * torch.eye(len(moment), dtype=moment.dtype)
    sites, edited = text_sites(pipe, layers, len(moment)), {}
    for name, site in sites.items():
        weight = site.read()
        W = weight.double().cpu()
        Q = rotation(erasing_term(W, C, G, erase_scale) + W @ keep @ W.T)
        edited[name] = (Q @ W).to(weight.device)
    write_weights(sites, edited)
    return pipe


def erasing_term(W: Tensor, C: Tensor, G: Tensor, scale: float) -> Tensor:
    """−a G (I − G*), `(out, out)`: G and G* project on what W `(out, d)` makes of the concepts C `(n, d)`
    and of the guides `(m, d)`."""
    concept, guide = projector(W @ C.T), projector(W @ G.T)
    return -scale * (concept - concept @ guide)


def projector(columns: Tensor) -> Tensor:
    """The projector `(out, out)` onto the span of the columns `(out, n)`, each brought to length one
    first."""
    Q = torch.linalg.qr(columns / columns.norm(dim=0)).Q
    return Q @ Q.T


def rotation(M: Tensor) -> Tensor:
    """The rotation Q (orthogonal, determinant 1) with the largest tr(Qᵀ M), for M `(n, n)`."""
    U, _, Vh = torch.linalg.svd(M)
    U[:, -1] *= torch.linalg.det(U @ Vh).sign()
    return U @ Vh
