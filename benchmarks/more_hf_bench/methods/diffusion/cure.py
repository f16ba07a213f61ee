"""CURE: Concept Unlearning via Orthogonal Representation Editing (Biswas et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from more_hf.core.errors import MoreError

from .roles import Concepts, name_roles
from .texts import Texts
from .weights import multiply


def cure(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    alpha: float = 2.0,
    tokens: str = "content",
) -> DiffusionPipeline:
    """Erase concepts with CURE's spectral eraser: edits the pipeline's keys and values in place and returns
    it.

    Source: CURE, spectral eraser with its expansion mechanism. It has no target: `remap_to` only joins the
    retained names.

    Args:
        pipe, concepts: as in `erase_concept`.
        remap_to, retain (*optional*): names to keep. Without any, the forgotten subspace is projected out
            whole.
        alpha (`float`, defaults to 2): how much the weaker directions are raised (published: 2, and 5 for
            nudity).
        tokens (`str`, defaults to `"content"`): `"content"` (every token of a name), `"last"` (its last one)
            or `"padded"` (all positions but the begin token). The paper does not say.

    Raises:
        `PrototypeError`, `SiteNotFoundError`: as `erase_concept` does, the latter also for a denoiser that
            reads T5.
    """
    roles, texts = name_roles(concepts, remap_to, retain), Texts(pipe)
    features = {
        "content": texts.content,
        "last": texts.last_tokens,
        "padded": lambda names: texts.prompts(names)[:, 1:].flatten(0, 1),
    }
    if tokens not in features:
        raise MoreError(f"Unknown tokens {tokens!r}. Choose one of {', '.join(map(repr, features))}.")
    multiply(pipe, eraser(features[tokens](roles.forget), features[tokens](roles.keep), alpha))
    return pipe


def eraser(forget: Tensor, keep: Tensor, alpha: float) -> Tensor:
    """I − (P_f − P_f P_r), `(d, d)`, for features `(n, d)` to forget and `(m, d)` to keep, float64."""
    P_f, P_r = expanded_projector(forget, alpha), expanded_projector(keep, alpha)
    return torch.eye(len(P_f), dtype=P_f.dtype) - P_f + P_f @ P_r


def expanded_projector(features: Tensor, alpha: float) -> Tensor:
    """V Λ Vᵀ `(d, d)`, with V the right singular vectors of features `(n, d)` and λ = α r / ((α − 1) r + 1),
    where r is each vector's share of the energy."""
    if not len(features):
        return torch.zeros(features.shape[1], features.shape[1], dtype=features.dtype)
    _, values, V = torch.linalg.svd(features, full_matrices=False)
    energy = values**2 / (values**2).sum()
    expansion = alpha * energy / ((alpha - 1) * energy + 1)
    return (V.T * expansion) @ V
