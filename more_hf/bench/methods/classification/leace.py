"""Least-squares concept erasure: no linear probe can tell what is forgotten from the rest, or from one other class."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.functional import one_hot

from ....core.errors import MoreError
from .feature_map import attach, features, find_head


AGAINST = ("rest", "target")


def leace(
    model: nn.Module, splits, *, seed: int = 0, against: str = "rest", target: int | None = None, batch_size: int = 500
) -> nn.Module:
    """Move features as little as linear guardedness allows: LEACE (Belrose et al., 2023), through the package `concept-erasure`.

    Args:
        against (`str`, defaults to `"rest"`): what D_f's classes shall not be told from: all of D_r, or with `"target"` the one class
            `target`; then only samples of these classes are fitted.
        target (`int`, *optional*): a remaining class; the first if not given.

    Raises `MoreError` for another `against`, or a target that does not remain.
    """
    from concept_erasure import LeaceFitter

    if against not in AGAINST:
        raise MoreError(f"Unknown contrast {against!r}. Choose one of {', '.join(map(repr, AGAINST))}.")
    _, head = find_head(model, splits.f)
    classes = splits.f.labels.unique()
    remain = splits.r
    if against == "target":
        remaining = remain.labels.unique().tolist()
        target = remaining[0] if target is None else target
        if target not in remaining:
            raise MoreError(f"Class {target} is not among the remaining classes {remaining}. Choose one of them.")
        remain = remain.subset(remain.labels == target)
    fitter = None
    for part, is_forget in ((splits.f, True), (remain, False)):
        z, labels = features(model, head, part.loader(batch_size))
        concept = one_hot(torch.searchsorted(classes.to(labels), labels), len(classes)) if is_forget else z.new_zeros(len(z), len(classes))
        fitter = fitter or LeaceFitter(z.shape[1], len(classes), dtype=z.dtype, device=z.device)
        fitter.update(z, concept.to(z))
    eraser = fitter.eraser
    moved = eraser.proj_left @ eraser.proj_right  # z − moved (z − mean)
    return attach(model, head, torch.eye(len(moved), dtype=moved.dtype, device=moved.device) - moved, moved @ eraser.bias)


leace_rest = partial(leace, against="rest")
leace_target = partial(leace, against="target")
