"""ESC with a learnt mask over the principal directions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ...splits import Splits
from .esc import directions, is_as_released
from .head_features import attach, features, find_head


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

    Raises:
        `MoreError`: for another mode.
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
            mask = step(Z[rows], labels[rows], U, mask, W, b, lr)
        if not (masked_logits(Z, U * mask, W, b).argmax(-1) == labels).any():
            break
    V = U * (mask > threshold)
    return attach(model, head, V @ V.T)


esc_t_as_released = partial(esc_t, mode="as_released")


def step(
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
