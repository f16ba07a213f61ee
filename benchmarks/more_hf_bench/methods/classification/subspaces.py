"""A linear map in front of the head: ESC, ESC-T, POUR-P and LEACE."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, one_hot

from more_hf.core.request import check_choice

from ...splits import Splits
from .head_features import attach, features, find_head, remaining_class


MODES = ("eval", "as_released")


def esc(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    percent: float = 1.5,
    mode: str = "eval",
    batch_size: int = 64,
) -> nn.Module:
    """z becomes (I − U_k U_kᵀ) z, with U_k the first k left singular vectors of D_f's features, not centred:
    ESC (Lee et al., 2025).

    Args:
        percent (`float`, defaults to 1.5): k as a part of the width d, rounded down as in the source, but at
            least 1: below d = 67 the source's k is 0 and it would do nothing.
        mode (`str`, defaults to `"eval"`): `"as_released"` collects the features in training mode, as the
            released code does: the running statistics of BatchNorm become D_f's, and stay so.
    """
    _, head = find_head(model, splits.f)
    Z, _ = features(model, head, splits.f.loader(batch_size, seed=seed), training=is_as_released(mode))
    k = max(1, int(Z.shape[1] * percent / 100))
    U = directions(Z)[:, :k]
    return attach(model, head, torch.eye(len(U)).to(U) - U @ U.T)


esc_as_released = partial(esc, mode="as_released")


def directions(Z: Tensor) -> Tensor:
    """All left singular vectors of Zᵀ `(d, d)`, largest first, for features `(n, d)`; through ZᵀZ, in O(d²)
    memory."""
    return torch.linalg.eigh(Z.T @ Z).eigenvectors.flip(1)


def is_as_released(mode: str) -> bool:
    """Whether the mode is the released code's. Raises `MoreError` for an unknown one."""
    check_choice("mode", mode, MODES)
    return mode == "as_released"


def esc_t(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    threshold: float = 0.7,
    epochs: int = 50,
    mode: str = "eval",
    batch_size: int = 64,
) -> nn.Module:
    """z becomes V Vᵀ z with V = U ⊙ M: U are ESC's directions, all of them, M a 0/1 mask of the same shape:
    ESC-T (Lee et al., 2025).

    M starts at one. In each batch of D_f the samples that are still right push their loss up: M ← clip(M +
    lr ∂CE/∂M, 0, 1); an epoch without a right sample is the last. Then M > threshold. V Vᵀ is no projection
    in general.

    Args:
        lr (`float`), threshold (`float`), epochs (`int`), batch_size (`int`): the source's.
        mode (`str`, defaults to `"eval"`): `"as_released"` collects the directions, and runs the first
            epoch, in training mode, as the released code does: the running statistics of BatchNorm become
            D_f's, and stay so.
    """
    released = is_as_released(mode)
    _, head = find_head(model, splits.f)
    loader = splits.f.loader(batch_size, seed=seed)
    Z, labels = features(model, head, loader, training=released)
    U = directions(Z)
    mask = torch.ones_like(U)
    W = head.weight.detach().double()
    b = None if head.bias is None else head.bias.detach().double()
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        if epoch <= 1:  # the features only change with the mode
            Z, labels = features(model, head, loader, training=released and epoch == 0)
        for rows in torch.randperm(len(Z), generator=generator).split(batch_size):
            mask = esc_t_step(Z[rows], labels[rows], U, mask, W, b, lr)
        if not (masked_logits(Z, U * mask, W, b).argmax(-1) == labels).any():
            break
    V = U * (mask > threshold)
    return attach(model, head, V @ V.T)


esc_t_as_released = partial(esc_t, mode="as_released")


def esc_t_step(
    Z: Tensor, labels: Tensor, U: Tensor, mask: Tensor, W: Tensor, b: Tensor | None, lr: float
) -> Tensor:
    """The mask after one batch: features `(n, d)`, labels `(n,)`, directions and mask `(d, d)`, the head's
    weight `(k, d)` and bias `(k,)`."""
    right = masked_logits(Z, U * mask, W, b).argmax(-1) == labels
    if not right.any():
        return mask
    with torch.enable_grad():
        mask = mask.detach().requires_grad_()
        loss = cross_entropy(masked_logits(Z[right], U * mask, W, b), labels[right])
        (gradient,) = torch.autograd.grad(loss, mask)
    return (mask.detach() + lr * gradient).clamp(0, 1)


def masked_logits(Z: Tensor, V: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """Logits `(n, k)` of the features V Vᵀ z."""
    return linear(Z @ V, W @ V, b)


def pour(model: nn.Module, splits: Splits, *, seed: int = 0) -> nn.Module:
    """z becomes (I − Q Qᵀ) z, Q an orthonormal basis of the forgotten classes' rows of the head: POUR-P (Le
    et al., 2026). It reads no image: by neural collapse a class's row is its direction in the features.
    """
    _, head = find_head(model, splits.f)
    Q = torch.linalg.qr(head.weight.detach()[splits.f.labels.unique()].double().T).Q
    return attach(model, head, torch.eye(len(Q)).to(Q) - Q @ Q.T)


AGAINST = ("rest", "target")


def leace(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    against: str = "rest",
    target: int | None = None,
    batch_size: int = 500,
) -> nn.Module:
    """Move features as little as linear guardedness allows: LEACE (Belrose et al., 2023), through the package
    `concept-erasure`.

    Args:
        against (`str`, defaults to `"rest"`): what D_f's classes shall not be told from: all of D_r, or with
            `"target"` the one class `target`; then only samples of these classes are fitted.
        target (`int`, *optional*): a remaining class; the first if not given.
    """
    from concept_erasure import LeaceFitter

    check_choice("contrast", against, AGAINST)
    _, head = find_head(model, splits.f)
    remain = splits.r
    if against == "target":
        remain = remain.subset(remain.labels == remaining_class(splits, target))
    # The concept is which forgotten class a sample has, one-hot; zero for what remains.
    z, labels = features(model, head, splits.f.loader(batch_size))
    classes, positions = labels.unique(return_inverse=True)
    fitter = LeaceFitter(z.shape[1], len(classes), dtype=z.dtype, device=z.device)
    fitter.update(z, one_hot(positions, len(classes)).to(z))
    z, _ = features(model, head, remain.loader(batch_size))
    fitter.update(z, z.new_zeros(len(z), len(classes)))
    # LEACE gives z − M (z − mean).
    eraser = fitter.eraser
    M = eraser.proj_left @ eraser.proj_right
    return attach(model, head, torch.eye(len(M)).to(M) - M, M @ eraser.bias)


leace_rest = partial(leace, against="rest")
leace_target = partial(leace, against="target")
