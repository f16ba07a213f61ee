"""Published closed forms: UCE, RECE, CURE, SPEED and OCE."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from more_hf.core.request import check_choice
from more_hf.diffusion.encoder import Encoder, fit_prototypes

from .texts import Concepts, Retained, Roles, Targets, Texts, expanded, guides, name_roles, ordinary_prompts
from .weights import multiply, text_sites, write_weights


def uce(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    variant: str = "current",
    guide: str | None = None,
    lamb: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float | None = None,
    expand: str | None = None,
) -> DiffusionPipeline:
    """Erase with Unified Concept Editing (Gandikota et al., WACV 2024): its closed form for keys and values.

    Settings are those of its two public scripts. Since the targets are the original layer's own outputs, the
    edit is W A with one matrix A for all layers (`edit_matrix`).

    Args:
        variant (`str`, defaults to `"current"`): `"current"` reads the last token of each name; `"paper"`
            (2023, what the published tables were made with) the last token, the end token and the padding,
            and preserves every token of the retained names and of the empty prompt.
        guide (`str`, *optional*): what the concepts become, if not `remap_to`. Without both: `"art"`.
        lamb (`float`), erase_scale (`float`), preserve_scale (`float`, *optional*): weights of the terms. λ
            is in units of squared features, and does not carry over between text encoders of different
            scale. `preserve_scale` defaults to 1 for `"current"`, to max(0.1, 1 / number of preserved
            prompts) for `"paper"`.
        expand (`str`, *optional*): `"art"` or `"object"` adds five prompts per name (`"current"` only).
    """
    check_choice("variant", variant, ("current", "paper"))
    roles, texts = name_roles(concepts, remap_to, retain), Texts(pipe)
    if variant == "current":
        C, G, R = last_token_rows(texts, roles, guides(roles, guide), expand)
        published_scale = 1.0
    else:
        C, G, R = sequence_rows(texts, roles, guides(roles, guide))
        published_scale = max(0.1, 1 / (1 + len(roles.keep)))  # the empty prompt is preserved too
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


def rece(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    guide: str | None = None,
    epochs: int = 1,
    rho: float = 1e-3,
    lamb: float = 0.1,
    preserve_scale: float = 0.1,
    start_lamb: float = 0.5,
) -> DiffusionPipeline:
    """Erase with Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024): UCE, then find the
    embeddings that still give the concept, and edit those too.

    Source: its closed form for the adversarial embedding with the regulariser toward zero; settings as
    published for artists. The authors' code inverts in float32, where at the published λ most of the change
    is rounding; this is what it computes in float64. The empty prompt is preserved, too.

    Args:
        guide (`str`, *optional*): as in `uce`.
        epochs (`int`, defaults to 1): rounds of adversarial embedding and edit.
        rho (`float`, defaults to 1e-3): ridge of the adversarial embedding (published: 1e-1 for easy objects
            and nudity).
        lamb (`float`), preserve_scale (`float`): of the edits in the epochs; `preserve_scale` also of the
            UCE edit that they start from.
        start_lamb (`float`, defaults to 0.5): λ of the UCE edit that they start from (the paper-era variant).
    """
    roles, texts = name_roles(concepts, remap_to, retain), Texts(pipe)
    guide_names = guides(roles, guide)
    # Start from UCE, on sequences.
    C, G, R = sequence_rows(texts, roles, guide_names)
    A = edit_matrix(C, G, R, lamb=start_lamb, erase_scale=1.0, preserve_scale=preserve_scale)
    weights = [site.read().double() for site in text_sites(pipe, "kv", len(A)).values()]
    gram = sum(W.T @ W for W in weights).cpu()
    rounds = {"epochs": epochs, "rho": rho, "lamb": lamb, "preserve_scale": preserve_scale}
    multiply(pipe, adversarial_rounds(texts, roles, guide_names, gram, A, **rounds))
    return pipe


def adversarial_rounds(
    texts: Texts,
    roles: Roles,
    guides: Sequence[str],
    gram: Tensor,
    A: Tensor,
    *,
    epochs: int,
    rho: float,
    lamb: float,
    preserve_scale: float,
) -> Tensor:
    """A with more edits behind it: in each epoch, of the embeddings that the layers edited so far, W A, still
    take for the concept's prompts. `gram` as of `adversarial_embeddings`, the rest as of `rece`."""
    C = texts.prompts(roles.forget).flatten(0, 1)
    G = texts.prompts(guides).mean(0).repeat(len(roles.forget), 1)
    R = texts.prompts(["", *roles.keep]).flatten(0, 1)
    for _ in range(epochs):
        adversarial = adversarial_embeddings(gram, A, C, rho)
        A = A @ edit_matrix(adversarial, G, R, lamb=lamb, erase_scale=1.0, preserve_scale=preserve_scale)
    return A


def adversarial_embeddings(gram: Tensor, A: Tensor, C: Tensor, rho: float) -> Tensor:
    """The inputs c' that bring the edited layers W A closest to what the original layers W made of C; both
    `(n, d)`.

    c' = (ρI + Σ W'ᵀ W')⁻¹ Σ W'ᵀ W c with W' = W A, the minimum of Σ ‖W' c' − W c‖² + ρ ‖c'‖². `gram` is Σ Wᵀ
    W `(d, d)` over all original layers, float64."""
    left = rho * torch.eye(len(gram), dtype=gram.dtype) + A.T @ gram @ A
    return torch.linalg.solve(left, A.T @ gram @ C.T).T


def cure(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    alpha: float = 2.0,
    tokens: str = "content",
) -> DiffusionPipeline:
    """Erase with Concept Unlearning via Orthogonal Representation Editing (Biswas et al., NeurIPS 2025): its
    spectral eraser with the expansion mechanism.

    It has no target: `remap_to` only joins the retained names. Without either, the forgotten subspace is
    projected out whole.

    Args:
        alpha (`float`, defaults to 2): how much the weaker directions are raised (published: 2, and 5 for
            nudity).
        tokens (`str`, defaults to `"content"`): `"content"` (every token of a name), `"last"` (its last one)
            or `"padded"` (all positions but the begin token). The paper does not say.
    """
    roles, texts = name_roles(concepts, remap_to, retain), Texts(pipe)
    features = {
        "content": texts.content,
        "last": texts.last_tokens,
        "padded": lambda names: texts.prompts(names)[:, 1:].flatten(0, 1),
    }
    check_choice("tokens", tokens, tuple(features))
    multiply(pipe, cure_eraser(features[tokens](roles.forget), features[tokens](roles.keep), alpha))
    return pipe


def cure_eraser(forget: Tensor, keep: Tensor, alpha: float) -> Tensor:
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


def speed(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    guide: str | None = None,
    layers: str = "v",
    threshold: float = 0.1,
    retain_scale: float = 1.0,
    lamb: float = 0.0,
    prior_filter: bool = True,
    augmentations: int = 10,
    seed: int = 0,
) -> DiffusionPipeline:
    """Erase with SPEED (ICLR 2026): an edit of the value layers in the null space of the retained names.

    Source: its closed form with influence-based prior filtering, directed prior augmentation and invariant
    equality constraints (the begin token and three centroids of the empty prompt's tokens stay exactly).

    Args:
        guide (`str`, *optional*): as in `uce`.
        layers (`str`, defaults to `"v"`): `"v"`, `"k"` or `"kv"`.
        threshold (`float`, defaults to 0.1): directions in which the retained names' second moment has a
            smaller singular value count as its null space (published: 1e-1 for few concepts, 1e-4 for many).
            It is absolute, and belongs to the text encoder's scale.
        retain_scale (`float`), lamb (`float`): ρ and λ of the closed form.
        prior_filter (`bool`, defaults to `True`): keep only the retained names that the plain edit would
            hurt more than their mean.
        augmentations (`int`, defaults to 10): noisy copies of each, along the layer's weakest direction.
        seed (`int`, defaults to 0): of that noise, and of the starts of the k-means.
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
        change = W @ speed_update(A, B, null_space(prior, threshold), K, retain_scale, lamb)
        edited[name] = (W + change).to(weight.device)
    write_weights(sites, edited)
    return pipe


def speed_update(A: Tensor, B: Tensor, P: Tensor, K: Tensor, rho: float, lamb: float) -> Tensor:
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


def oce(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    guide: str | None = None,
    erase_scale: float = 500.0,
    retain_scale: float = 1.0,
    global_scale: float = 10.0,
    lamb: float = 10.0,
    expand: str | None = "art",
    layers: str = "v",
) -> DiffusionPipeline:
    """Erase with Orthogonal Concept Erasure (ICML 2026): each value layer's outputs are rotated, W becomes Q
    W.

    Source: its orthogonal Procrustes problem; settings of its style script. The second moment of ordinary
    text is over the package's everyday prompts without the begin token (published: COCO-30k captions).
    Several targets span the guide subspace together.

    Args:
        guide (`str`, *optional*): as in `uce`.
        erase_scale, retain_scale, global_scale, lamb (`float`): weights of the erasure, of the retained
            names, of ordinary text and of the layer as it is (published: 500, 1, 10, 10 for styles; 800, 2,
            70, 10 for 100 celebrities).
        expand (`str`, *optional*): `"art"` or `"object"` adds five prompts per name; `None` adds none.
        layers (`str`, defaults to `"v"`): `"v"`, `"k"` or `"kv"`.
    """
    roles, texts = name_roles(concepts, remap_to, retain), Texts(pipe)
    C = torch.cat([texts.last_tokens(expanded(name, expand)) for name in roles.forget])
    G = torch.cat([texts.last_tokens(expanded(name, expand)) for name in guides(roles, guide)])
    R = texts.last_tokens(roles.keep)
    # What must stay, weighted: retained names, ordinary text, and the layer itself.
    ordinary = dict.fromkeys(ordinary_prompts(pipe, roles.forget), 1)
    moment = fit_prototypes(Encoder(pipe), [], "last", sigma_prompts=ordinary)["tokens"].moment.dense
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
    concept, guide = span_projector(W @ C.T), span_projector(W @ G.T)
    return -scale * (concept - concept @ guide)


def span_projector(columns: Tensor) -> Tensor:
    """The projector `(out, out)` onto the span of the columns `(out, n)`, each brought to length one
    first."""
    Q = torch.linalg.qr(columns / columns.norm(dim=0)).Q
    return Q @ Q.T


def rotation(M: Tensor) -> Tensor:
    """The rotation Q (orthogonal, determinant 1) with the largest tr(Qᵀ M), for M `(n, n)`."""
    U, _, Vh = torch.linalg.svd(M)
    U[:, -1] *= torch.linalg.det(U @ Vh).sign()
    return U @ Vh
