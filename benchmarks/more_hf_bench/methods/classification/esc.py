"""Project features away from the principal directions of what is forgotten."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from more_hf.core.errors import MoreError

from ...splits import Splits
from .head_features import attach, features, find_head


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

    Raises:
        `MoreError`: for another mode.
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
    if mode not in MODES:
        raise MoreError(f"Unknown mode {mode!r}. Choose one of {', '.join(map(repr, MODES))}.")
    return mode == "as_released"
