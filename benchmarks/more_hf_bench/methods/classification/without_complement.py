"""Ours without the complement term: a feature keeps nothing but its prototype coordinates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...splits import Splits
from .head_features import attach, class_means, find_head, remaining_class


def erase_without_complement(
    model: nn.Module, splits: Splits, *, seed: int = 0, batch_size: int = 500
) -> nn.Module:
    """z becomes P (D − diag(s) D) z, with P all class means, D = P⁺ and s the forgotten ones: MoRE, Eq. 3."""
    _, head = find_head(model, splits.f)
    P_F, P_R = (class_means(model, part, batch_size) for part in (splits.f, splits.r))
    return attach(model, head, inside_prototypes(P_F, P_R, torch.zeros_like(P_F)))


def remap_without_complement(
    model: nn.Module, splits: Splits, *, seed: int = 0, target: int | None = None, batch_size: int = 500
) -> nn.Module:
    """z becomes P (D − diag(s) D) z + P_t diag(s) D z: the same, and every forgotten class goes to one
    remaining class.

    Args:
        target (`int`, *optional*): the remaining class; the first if not given.

    Raises:
        `MoreError`: for a target that does not remain.
    """
    target = remaining_class(splits, target)
    _, head = find_head(model, splits.f)
    P_F, P_R = (class_means(model, part, batch_size) for part in (splits.f, splits.r))
    P_t = P_R[:, splits.r.labels.unique() == target]
    return attach(model, head, inside_prototypes(P_F, P_R, P_t.expand_as(P_F)))


def inside_prototypes(P_F: Tensor, P_R: Tensor, P_t: Tensor) -> Tensor:
    """The map `(d, d)` that keeps remaining coordinates, moves forgotten ones to the columns of P_t, and
    leaves nothing beside the prototypes."""
    D = torch.linalg.pinv(torch.cat([P_F, P_R], dim=1))
    return torch.cat([P_t, P_R], dim=1) @ D
