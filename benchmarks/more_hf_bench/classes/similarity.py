"""The similarity of two sets of features: cosines of class means, and linear CKA. Pure functions, float64."""

from __future__ import annotations

import torch
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Average features `(n, d)` over labels `(n,)`: `(num_classes, d)`, float64, zero without a sample."""
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, features.double())
    return sums / torch.bincount(labels, minlength=num_classes).clamp_min(1)[:, None]


def prototype_cosines(before: Tensor, after: Tensor) -> Tensor:
    """Compare class means `(k, d)` before and after an edit (MoRE, Figs. 3 and 6).

    Returns:
        `Tensor`: `(k, k)`, the cosine of every mean before (rows) with every mean after (columns), −1 to 1.
            On the diagonal
        1 is best for a class that remains, and a forgotten class f should be low; if f was sent to t, entry
        (t, f) is 1. A zero mean has cosine 0 with everything.
    """
    before = torch.nn.functional.normalize(before.double(), dim=1)
    after = torch.nn.functional.normalize(after.double(), dim=1)
    return before @ after.T


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Compute the linear centred kernel alignment of two sets of features (Kornblith et al., 2019).

    ‖Xᵀ Y‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred X `(n, d1)` and Y `(n, d2)`: exact, over all samples at once.

    Returns:
        `float`: 0 to 1; 1 for features that agree up to rotation, shift and scale, 0 where one side is
            constant. High is
        good on what remains; on what is forgotten, the comparison is with Retrain's value.
    """
    X = first.double() - first.double().mean(0)
    Y = second.double() - second.double().mean(0)
    scale = (X.T @ X).norm() * (Y.T @ Y).norm()
    return ((Y.T @ X).square().sum() / scale).item() if scale > 0 else 0.0
