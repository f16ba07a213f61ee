"""Ours without prototype orthogonalisation: the dual of the forget prototypes alone."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import MoreError
from .feature_map import attach, features, find_head


def erase_without_po(model: nn.Module, splits, *, seed: int = 0, batch_size: int = 500) -> nn.Module:
    """z becomes (I − P_F P_F⁺) z, P_F the class means of D_f: MoRE's ablation "Erase without PO" (Table 3). D_r is not read."""
    P_F, head = _means(model, splits.f, batch_size)
    return attach(model, head, torch.eye(len(P_F)).to(P_F) - P_F @ torch.linalg.pinv(P_F))


def remap_without_po(model: nn.Module, splits, *, seed: int = 0, target: int | None = None, batch_size: int = 500) -> nn.Module:
    """z becomes (I + (P_t − P_F) P_F⁺) z: every forgotten class goes to one remaining class, the others are not spared.

    Args:
        target (`int`, *optional*): the remaining class; the first if not given.

    Raises `MoreError` for a target that does not remain.
    """
    remaining = splits.r.labels.unique().tolist()
    target = remaining[0] if target is None else target
    if target not in remaining:
        raise MoreError(f"Class {target} is not among the remaining classes {remaining}. Choose one of them.")
    P_F, head = _means(model, splits.f, batch_size)
    P_t, _ = _means(model, splits.r.subset(splits.r.labels == target), batch_size)
    return attach(model, head, torch.eye(len(P_F)).to(P_F) + (P_t - P_F) @ torch.linalg.pinv(P_F))


def _means(model: nn.Module, images, batch_size: int):
    """Class means as columns `(d, f)`, float64, and the head."""
    _, head = find_head(model, images)
    z, labels = features(model, head, images.loader(batch_size))
    return torch.stack([z[labels == c].mean(0) for c in labels.unique()], dim=1), head
