"""RECE: Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .roles import Concepts, guides, name_roles
from .texts import Texts
from .uce import edit_matrix, sequence_rows
from .weights import multiply, text_sites


def rece(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    guide: str | None = None,
    epochs: int = 1,
    rho: float = 1e-3,
    lamb: float = 0.1,
    preserve_scale: float = 0.1,
    start_lamb: float = 0.5,
) -> DiffusionPipeline:
    """Erase concepts with RECE: UCE, then find the embeddings that still give the concept and edit those
    too. In place; returns the pipeline.

    Source: RECE, its closed form for the adversarial embedding with the regulariser toward zero; settings as
    published for artists. The authors' code inverts in float32, where at the published λ most of the change
    is rounding; this is what it computes in float64.

    Args:
        pipe, concepts, remap_to: as in `erase_concept`. Several targets: their mean.
        retain (`Sequence[str]`, *optional*): names to preserve, besides the targets and the empty prompt.
        guide (`str`, *optional*): what the concepts become, if not `remap_to`. Without both: `"art"`.
        epochs (`int`, defaults to 1): rounds of adversarial embedding and edit.
        rho (`float`, defaults to 1e-3): ridge of the adversarial embedding (published: 1e-1 for easy objects
            and nudity).
        lamb (`float`), preserve_scale (`float`): of the edits in the epochs; `preserve_scale` also of the
            UCE edit that they start from.
        start_lamb (`float`, defaults to 0.5): λ of the UCE edit that they start from (the paper-era variant).

    Raises:
        `PrototypeError`, `SiteNotFoundError`: as `erase_concept` does, the latter also for a denoiser that
            reads T5.
    """
    roles, texts = name_roles(concepts, remap_to, retain), Texts(pipe)
    guide_names = guides(roles, guide)
    # Start from UCE, on sequences.
    C, G, R = sequence_rows(texts, roles, guide_names)
    A = edit_matrix(C, G, R, lamb=start_lamb, erase_scale=1.0, preserve_scale=preserve_scale)
    weights = [site.read().double() for site in text_sites(pipe, "kv", len(A)).values()]
    gram = sum(W.T @ W for W in weights).cpu()
    # In each epoch, edit the embeddings that the layers edited so far still take for the concept's prompts.
    C = texts.prompts(roles.forget).flatten(0, 1)
    G = texts.prompts(guide_names).mean(0).repeat(len(roles.forget), 1)
    for _ in range(epochs):
        adversarial = adversarial_embeddings(gram, A, C, rho)
        A = A @ edit_matrix(adversarial, G, R, lamb=lamb, erase_scale=1.0, preserve_scale=preserve_scale)
    multiply(pipe, A)
    return pipe


def adversarial_embeddings(gram: Tensor, A: Tensor, C: Tensor, rho: float) -> Tensor:
    """The inputs c' that bring the edited layers W A closest to what the original layers W made of C; both
    `(n, d)`.

    c' = (ρI + Σ W'ᵀ W')⁻¹ Σ W'ᵀ W c with W' = W A, the minimum of Σ ‖W' c' − W c‖² + ρ ‖c'‖². `gram` is Σ Wᵀ
    W `(d, d)` over all original layers, float64."""
    left = rho * torch.eye(len(gram), dtype=gram.dtype) + A.T @ gram @ A
    return torch.linalg.solve(left, A.T @ gram @ C.T).T
