"""UCE: Unified Concept Editing (Gandikota et al., WACV 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from more_hf.core.errors import MoreError

from .roles import Concepts, Roles, guides, name_roles
from .texts import Texts, expanded
from .weights import multiply


def uce(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    variant: str = "current",
    guide: str | None = None,
    lamb: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float | None = None,
    expand: str | None = None,
) -> DiffusionPipeline:
    """Erase concepts with UCE's closed form: edits the pipeline's keys and values in place and returns it.

    Source: UCE, its closed form, with the settings of its two public scripts. Since the targets are the
    original layer's own outputs, the edit is W A with one matrix A for all layers (`edit_matrix`).

    Args:
        pipe, concepts, remap_to: as in `erase_concept`. Several targets: their mean.
        retain (`Sequence[str]`, *optional*): names to preserve, besides the targets.
        variant (`str`, defaults to `"current"`): `"current"` reads the last token of each name; `"paper"`
            (2023, what the published tables were made with) the last token, the end token and the padding,
            and preserves every token of the retained names and of the empty prompt.
        guide (`str`, *optional*): what the concepts become, if not `remap_to`. Without both: `"art"`.
        lamb (`float`), erase_scale (`float`), preserve_scale (`float`, *optional*): weights of the terms. λ
            is in units of squared features, and does not carry over between text encoders of different
            scale. `preserve_scale` defaults to 1 for `"current"`, to max(0.1, 1 / number of preserved
            prompts) for `"paper"`.
        expand (`str`, *optional*): `"art"` or `"object"` adds five prompts per name (`"current"` only).

    Raises:
        `PrototypeError`, `SiteNotFoundError`: as `erase_concept` does, the latter also for a denoiser that
            reads T5.
    """
    roles, texts = name_roles(concepts, remap_to, retain), Texts(pipe)
    if variant == "current":
        C, G, R = last_token_rows(texts, roles, guides(roles, guide), expand)
        published_scale = 1.0
    elif variant == "paper":
        C, G, R = sequence_rows(texts, roles, guides(roles, guide))
        published_scale = max(0.1, 1 / (1 + len(roles.keep)))  # the empty prompt is preserved too
    else:
        raise MoreError(f"Unknown variant {variant!r}. Choose 'current' or 'paper'.")
    if preserve_scale is None:
        preserve_scale = published_scale
    A = edit_matrix(C, G, R, lamb=lamb, erase_scale=erase_scale, preserve_scale=preserve_scale)
    multiply(pipe, A)
    return pipe


uce_paper = partial(uce, variant="paper")


def edit_matrix(
    C: Tensor, G: Tensor, R: Tensor, *, lamb: float, erase_scale: float, preserve_scale: float
) -> Tensor:
    """The matrix A `(d, d)` for which W A is UCE's edited layer.

    A = (λI + a_e Σ g cᵀ + a_p Σ r rᵀ)(λI + a_e Σ c cᵀ + a_p Σ r rᵀ)⁻¹

    Args:
        C (`Tensor`), G (`Tensor`): `(n, d)`, float64, features to edit and what each becomes.
        R (`Tensor`): `(m, d)`, float64, features to preserve; m may be 0.
        lamb (`float`), erase_scale (`float`), preserve_scale (`float`): λ, a_e, a_p.
    """
    preserved = preserve_scale * R.T @ R + lamb * torch.eye(C.shape[1], dtype=C.dtype)
    left = preserved + erase_scale * G.T @ C
    right = preserved + erase_scale * C.T @ C
    return torch.linalg.solve(right, left.T).T  # `right` is symmetric


Rows = tuple[Tensor, Tensor, Tensor]


def last_token_rows(texts: Texts, roles: Roles, guides: Sequence[str], expand: str | None) -> Rows:
    """C, G `(n, d)` and R `(m, d)` of the current script: one vector per name, or per prompt of `expand`."""
    C = torch.cat([texts.last_tokens(expanded(name, expand)) for name in roles.forget])
    guide = torch.stack([texts.last_tokens(expanded(name, expand)) for name in guides]).mean(0)
    return C, guide.repeat(len(roles.forget), 1), texts.last_tokens(roles.keep)


def sequence_rows(texts: Texts, roles: Roles, guides: Sequence[str]) -> Rows:
    """C, G `(n, d)` and R `(m, d)` of the paper's script: each name from its last token on, aligned with its
    guide from there.

    Both sequences begin at their own last token and are as long as the one that begins later.
    """
    guide_features = texts.prompts(guides)
    guide_starts = [texts.last(name) for name in guides]
    C, G = [], []
    for name, features in zip(roles.forget, texts.prompts(roles.forget), strict=True):
        start = texts.last(name)
        length = len(features) - max(start, *guide_starts)
        aligned = [z[at : at + length] for z, at in zip(guide_features, guide_starts, strict=True)]
        C.append(features[start : start + length])
        G.append(torch.stack(aligned).mean(0))
    return torch.cat(C), torch.cat(G), texts.prompts(["", *roles.keep]).flatten(0, 1)
