"""SPEED: concept erasure in the null space of what is retained (ICLR 2026)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .roles import Concepts, guides, name_roles
from .texts import Texts
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
    """Erase concepts with SPEED: an edit of the value layers in the null space of the retained names. In
    place; returns the pipeline.

    Source: SPEED, its closed form with influence-based prior filtering, directed prior augmentation and
    invariant equality constraints (the begin token and three centroids of the empty prompt's tokens stay
    exactly).

    Args:
        pipe, concepts, remap_to: as in `erase_concept`. Several targets: their mean.
        retain (`Sequence[str]`, *optional*): names to keep, besides the targets.
        guide (`str`, *optional*): what the concepts become, if not `remap_to`. Without both: `"art"`.
        layers (`str`, defaults to `"v"`): `"v"`, `"k"` or `"kv"`.
        threshold (`float`, defaults to 0.1): directions in which the retained names' second moment has a
            smaller singular value count as its null space (published: 1e-1 for few concepts, 1e-4 for many).
            It is absolute, and belongs to the text encoder's scale.
        retain_scale (`float`), lamb (`float`): ρ and λ of the closed form.
        prior_filter (`bool`, defaults to `True`): keep only the retained names that the plain edit would
            hurt more than their mean.
        augmentations (`int`, defaults to 10): noisy copies of each, along the layer's weakest direction.
        seed (`int`, defaults to 0): of that noise, and of the starts of the k-means.

    Raises:
        `PrototypeError`, `SiteNotFoundError`: as `erase_concept` does, the latter also for a denoiser that
            reads T5.
    """
    roles, texts = name_roles(concepts, remap_to, retain), Texts(pipe)
    C = texts.last_tokens(roles.forget)
    G = texts.last_tokens(guides(roles, guide)).mean(0, keepdim=True)
    R = texts.last_tokens(roles.keep)
    # K: what stays exactly, the begin token and three centroids of the other tokens of the empty prompt
    empty = texts.prompts([""])[0]
    K = torch.cat([empty[:1], centroids(empty[1:], 3, seed)]).T
    # A = mean of c cᵀ, B = mean of g cᵀ
    A = C.T @ C / len(C)
    B = G.T @ C.mean(0, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    sites, edited = text_sites(pipe, layers, len(A)), {}
    for name, site in sites.items():
        weight = site.read()
        W = weight.double().cpu()
        prior = refined_prior(W, A, B, R, augmentations, generator) if prior_filter else R
        change = W @ update(A, B, null_space(prior, threshold), K, retain_scale, lamb)
        edited[name] = (W + change).to(weight.device)
    write_weights(sites, edited)
    return pipe


def update(A: Tensor, B: Tensor, P: Tensor, K: Tensor, rho: float, lamb: float) -> Tensor:
    """The matrix `(d, d)` that W is multiplied with to give ΔW.

    ΔW = W (B − A) P [I − M K (Kᵀ P M K + λI)⁻¹ Kᵀ P] M with M = (A P + ρI)⁻¹ and K `(d, n)`. It is zero on
    every x with P x = 0 and, for λ = 0, on K."""
    eye = torch.eye(len(A), dtype=A.dtype)
    M = torch.linalg.inv(A @ P + rho * eye)
    inner = K.T @ P @ M @ K
    inner = inner + lamb * torch.eye(len(inner), dtype=A.dtype)
    # A column of K that P removes is invariant already and makes this singular.
    constraint = eye - M @ K @ torch.linalg.pinv(inner, rtol=1e-10) @ K.T @ P
    return (B - A) @ P @ constraint @ M


def null_space(prior: Tensor, threshold: float) -> Tensor:
    """The projector `(d, d)` on the directions in which the mean of r rᵀ over features `(n, d)` is below the
    threshold."""
    d = prior.shape[1]
    if not len(prior):
        return torch.eye(d, dtype=prior.dtype)
    values, vectors = torch.linalg.eigh(prior.T @ prior / len(prior))
    weak = vectors[:, values < threshold]
    return weak @ weak.T


def refined_prior(
    W: Tensor, A: Tensor, B: Tensor, R: Tensor, augmentations: int, generator: torch.Generator
) -> Tensor:
    """The retained features `(m, d)` that the plain edit of W would move more than it moves them on average,
    and those of their noisy copies of which the same is true; `(n, d)`."""
    if not len(R):
        return R
    # Influence-based prior filtering: the plain edit is ΔW = W (B − A)(I + A)⁻¹.
    plain = W @ torch.linalg.solve(torch.eye(len(A), dtype=A.dtype) + A, (B - A).T).T
    influence = (R @ plain.T).norm(dim=1)
    influenced = R[influence >= influence.mean()]
    # Directed prior augmentation: noise along W's weakest right singular direction. The reduced decomposition
    # has none that W maps to zero, as the full one has wherever W has fewer rows than columns.
    weakest = torch.linalg.svd(W, full_matrices=False).Vh[-1]
    noise = torch.randn(augmentations, *influenced.shape, generator=generator, dtype=R.dtype)
    copies = (influenced + (noise @ weakest)[..., None] * weakest).flatten(0, 1)
    return torch.cat([influenced, copies[(copies @ plain.T).norm(dim=1) >= influence.mean()]])


def centroids(points: Tensor, count: int, seed: int) -> Tensor:
    """The centres `(up to count, d)` of k-means on points `(n, d)`, the best of ten starts."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(min(count, len(points)), n_init=10, random_state=seed).fit(points.numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(points)
