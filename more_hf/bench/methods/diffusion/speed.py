"""SPEED: concept erasure in the null space of what is retained (ICLR 2026)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .names import Concepts, Texts, guides, names_asked
from .weights import text_sites, write_weights


def speed(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    guide: str | None = None,
    layers: str = "v",
    threshold: float = 0.1,
    retain_scale: float = 1.0,
    lamb: float = 0.0,
    prior_filter: bool = True,
    augmentations: int = 10,
    seed: int = 0,
) -> DiffusionPipeline:
    """Erase concepts with SPEED: an edit of the value layers in the null space of the retained names. In place; returns the pipeline.

    Source: SPEED, its closed form with influence-based prior filtering, directed prior augmentation and invariant equality
    constraints (the begin token and three centroids of the empty prompt's tokens stay exactly).

    Args:
        pipe, concepts, remap_to: as in `erase_concept`. Several targets: their mean.
        retain (`Sequence[str]`, *optional*): names to keep, besides the targets.
        guide (`str`, *optional*): what the concepts become, if not `remap_to`. Without both: `"art"`.
        layers (`str`, defaults to `"v"`): `"v"`, `"k"` or `"kv"`.
        threshold (`float`, defaults to 0.1): directions in which the retained names' second moment has a smaller singular value count as
            its null space (published: 1e-1 for few concepts, 1e-4 for many). It is absolute, and belongs to the text encoder's scale.
        retain_scale (`float`), lamb (`float`): ρ and λ of the closed form.
        prior_filter (`bool`, defaults to `True`): keep only the retained names that the plain edit would hurt more than their mean.
        augmentations (`int`, defaults to 10): noisy copies of each, along the layer's weakest direction.
        seed (`int`, defaults to 0): of that noise and nothing else.

    Raises `PrototypeError` and `TargetNotFoundError` as `erase_concept` does, the latter also for a denoiser that reads T5.
    """
    asked, texts = names_asked(concepts, remap_to, retain), Texts(pipe)
    C = texts.last_tokens(asked.forget)
    G = texts.last_tokens(guides(asked, guide, "art")).mean(0, keepdim=True)
    R = texts.last_tokens(asked.keep) if asked.keep else C[:0]
    empty = texts.prompts([""])[0]
    invariant = torch.cat([empty[:1], centroids(empty[1:], 3)]).T  # (d, up to 4)
    A, B = C.T @ C / len(C), G.T @ C.mean(0, keepdim=True)  # means of c cᵀ and g cᵀ, (d, d)
    generator = torch.Generator().manual_seed(seed)
    sites, values = text_sites(pipe, layers, len(A)), {}
    for name, site in sites.items():
        W = site.read().double().cpu()
        prior = refined_prior(W, A, B, R, augmentations, generator) if prior_filter else R
        values[name] = (W + W @ update(A, B, null_space(prior, threshold), invariant, retain_scale, lamb)).to(site.read().device)
    write_weights(sites, values)
    return pipe


def update(A: Tensor, B: Tensor, P: Tensor, invariant: Tensor, rho: float, lamb: float) -> Tensor:
    """ΔW = W times this `(d, d)`: (B − A) P [I − M K (Kᵀ P M K + λI)⁻¹ Kᵀ P] M with M = (A P + ρI)⁻¹ and K the invariant `(d, n)`.

    It is zero on every x with P x = 0 and, for λ = 0, on K.
    """
    eye = torch.eye(len(A), dtype=A.dtype)
    M = torch.linalg.inv(A @ P + rho * eye)
    inner = invariant.T @ P @ M @ invariant
    inner = inner + lamb * torch.eye(len(inner), dtype=A.dtype)
    # A column of K that P removes is invariant already and makes this singular.
    constrained = eye - M @ invariant @ torch.linalg.pinv(inner, rtol=1e-10) @ invariant.T @ P
    return (B - A) @ P @ constrained @ M


def null_space(prior: Tensor, threshold: float) -> Tensor:
    """`(d, d)`: the projector on the directions in which the mean of r rᵀ over `(n, d)` features is below the threshold."""
    d = prior.shape[1]
    if not len(prior):
        return torch.eye(d, dtype=prior.dtype)
    values, vectors = torch.linalg.eigh(prior.T @ prior / len(prior))
    weak = vectors[:, values < threshold]
    return weak @ weak.T


def refined_prior(W: Tensor, A: Tensor, B: Tensor, R: Tensor, augmentations: int, generator: torch.Generator) -> Tensor:
    """`(n, d)`: those of the retained features `(m, d)` that the plain edit of W would move more than it moves them on average, and
    those of their noisy copies along W's weakest right singular direction of which the same is true."""
    if not len(R):
        return R
    plain = W @ torch.linalg.solve(torch.eye(len(A), dtype=A.dtype) + A, (B - A).T).T  # W (B − A)(I + A)⁻¹
    moved = (R @ plain.T).norm(dim=1)
    kept = R[moved >= moved.mean()]
    weakest = torch.linalg.svd(W).Vh[-1]
    noise = torch.randn(augmentations, *kept.shape, generator=generator, dtype=R.dtype)
    copies = (kept + (noise @ weakest)[..., None] * weakest).flatten(0, 1)
    return torch.cat([kept, copies[(copies @ plain.T).norm(dim=1) >= moved.mean()]])


def centroids(points: Tensor, count: int, rounds: int = 50) -> Tensor:
    """`(up to count, d)`: k-means of `(n, d)` points, started from the first and then the farthest ones, so without randomness."""
    means = points[:1]
    while len(means) < min(count, len(points)):
        means = torch.cat([means, points[torch.cdist(points, means).amin(1).argmax()][None]])
    for _ in range(rounds):
        nearest = torch.cdist(points, means).argmin(1)
        means = torch.stack([points[nearest == i].mean(0) for i in range(len(means)) if (nearest == i).any()])
    return means
