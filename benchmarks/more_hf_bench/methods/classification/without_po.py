"""Ours without prototype orthogonalisation: the dual of the forget prototypes alone."""

from __future__ import annotations

import torch
from torch import nn

from ...splits import Splits
from .head_features import attach, class_means, find_head, remaining_class


def erase_without_po(model: nn.Module, splits: Splits, *, seed: int = 0, batch_size: int = 500) -> nn.Module:
    """z becomes (I − P_F P_F⁺) z, P_F the class means of D_f: MoRE's ablation "Erase without PO" (Table 3).
    D_r is not read."""
    _, head = find_head(model, splits.f)
    P_F = class_means(model, splits.f, batch_size)
    return attach(model, head, torch.eye(len(P_F)).to(P_F) - P_F @ torch.linalg.pinv(P_F))


def remap_without_po(
    model: nn.Module, splits: Splits, *, seed: int = 0, target: int | None = None, batch_size: int = 500
) -> nn.Module:
    """z becomes (I + (P_t − P_F) P_F⁺) z: every forgotten class goes to one remaining class, the others are
    not spared.

    Args:
        target (`int`, *optional*): the remaining class; the first if not given.

    Raises:
        `MoreError`: for a target that does not remain.
    """
    target = remaining_class(splits, target)
    _, head = find_head(model, splits.f)
    P_F = class_means(model, splits.f, batch_size)
    P_t = class_means(model, splits.r.subset(splits.r.labels == target), batch_size)
    return attach(model, head, torch.eye(len(P_F)).to(P_F) + (P_t - P_F) @ torch.linalg.pinv(P_F))
