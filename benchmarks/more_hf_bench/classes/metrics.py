"""Numbers of knowledge deletion: accuracies, harmonic means, areas under ROC curves, the load of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


SPLITS = ("f", "r", "ft", "rt")
"""Forget and remain, of the training set and (`t`) of the test set."""


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Compute the top-1 accuracy of logits `(n, k)` against labels `(n,)`.

    Returns:
        `float`: percent; up is better on what remains, down on what is forgotten.

    Raises:
        `ValueError`: if there is no sample.
    """
    if len(labels) == 0:
        raise ValueError("An accuracy needs at least one sample. Is a split empty?")
    return 100.0 * (logits.argmax(-1) == labels).double().mean().item()


def harmonic_mean(acc_f: float | np.ndarray, acc_r: float | np.ndarray) -> float | np.ndarray:
    """Compute 2 (100 − acc_f) acc_r / ((100 − acc_f) + acc_r), of percent (MoRE, appendix B.3).

    Returns:
        `float` or `np.ndarray`: 0 to 100, up is better; 0 where nothing is forgotten or nothing kept. HM is
            of the training splits, HM_t of the test splits.
    """
    forgotten = 100 - acc_f
    return 2 * forgotten * acc_r / np.maximum(forgotten + acc_r, 1e-12)


def kd_scores(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Return `acc_f acc_r acc_ft acc_rt hm hm_t`, in percent, from the accuracy of each split."""
    return {
        **{f"acc_{split}": accuracies[split] for split in SPLITS},
        "hm": harmonic_mean(accuracies["f"], accuracies["r"]),
        "hm_t": harmonic_mean(accuracies["ft"], accuracies["rt"]),
    }


def auc(positive: Tensor, negative: Tensor, *, resolution: float = 0.0) -> float:
    """Compute the probability that a score of `positive` is above one of `negative`, ties counted half.

    Args:
        positive, negative (`Tensor`): scores `(n,)` and `(m,)`.
        resolution (`float`, defaults to 0): scores are rounded to multiples of it. A difference that is zero
            in theory is not zero in floating point, and its remainder would be ranked as if it were evidence.

    Returns:
        `float`: percent; 50 says that the scores do not tell the two apart. It needs no prior, no threshold
            and no chance
        to break ties.
    """
    from sklearn.metrics import roc_auc_score

    scores = torch.cat([positive, negative]).double()
    if resolution:
        scores = (scores / resolution).round()
    return 100.0 * float(roc_auc_score([1] * len(positive) + [0] * len(negative), scores))


@dataclass(frozen=True)
class ExpertLoad:
    """How evenly a router spreads samples over experts.

    Attributes:
        shares (`list[float]`): percent of the samples that each expert took; they add up to 100.
        cv (`float`): their standard deviation over their mean, the coefficient of variation: 0 is even, down
            is better, at most √(num_experts − 1). Appendix D.3 of MoRE says variance over mean, which grows
            with the number of samples, but the numbers of its Table 15 are this.
    """

    shares: list[float]
    cv: float


def expert_load(experts: Tensor, num_experts: int) -> ExpertLoad:
    """Measure the load from the experts `(n,)` that samples took."""
    counts = torch.bincount(experts, minlength=num_experts).double()
    shares = counts / counts.sum()
    return ExpertLoad((100 * shares).tolist(), float(shares.std(correction=0) / shares.mean()))
