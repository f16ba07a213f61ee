"""Least-squares concept erasure: no linear probe can tell what is forgotten from the rest, or from one other
class."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.functional import one_hot

from more_hf.core.errors import MoreError

from ...splits import Splits
from .head_features import attach, features, find_head, remaining_class


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

    Raises:
        `MoreError`: for another `against`, or a target that does not remain.
    """
    from concept_erasure import LeaceFitter

    if against not in AGAINST:
        raise MoreError(f"Unknown contrast {against!r}. Choose one of {', '.join(map(repr, AGAINST))}.")
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
