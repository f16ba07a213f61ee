"""How alike two sets of features are: cosines of class means, and linear CKA. Pure functions, float64."""

from __future__ import annotations

import torch
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Means of features `(n, d)` over labels `(n,)`: `(num_classes, d)`, float64; zero for a class without a sample."""
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64).index_add_(0, labels, features.double())
    return sums / torch.bincount(labels, minlength=num_classes).clamp_min(1)[:, None]


def prototype_cosines(before: Tensor, after: Tensor) -> Tensor:
    """`(k, k)`: the cosine of every class mean before `(k, d)` with every class mean after `(k, d)`, rows before (MoRE, Figs. 3 and 6).

    Range −1 to 1. On the diagonal 1 is best for a class that remains; for a forgotten class f it should be low. If f was sent to t,
    entry (t, f) is 1. A zero mean has cosine 0 with everything.
    """
    before, after = (torch.nn.functional.normalize(means.double(), dim=1) for means in (before, after))
    return before @ after.T


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two feature sets `(n, d1)`, `(n, d2)` of the same n samples (Kornblith et al., 2019).

    ‖Xᵀ Y‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred X, Y: exact, over all samples at once. Range 0 to 1; 1 for features that agree up to
    rotation, shift and scale. No direction of its own: high is good on what remains, and on what is forgotten the comparison is with
    Retrain's value. 0 where one side is constant.
    """
    X, Y = (features.double() - features.double().mean(0) for features in (first, second))
    scale = (X.T @ X).norm() * (Y.T @ Y).norm()
    return ((Y.T @ X).square().sum() / scale).item() if scale > 0 else 0.0
