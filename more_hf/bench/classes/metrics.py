"""Knowledge deletion in numbers: accuracies, their harmonic mean, areas under ROC curves, the load of experts. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


SPLITS = ("f", "r", "ft", "rt")
"""Forget and remain, of the training set and (`t`) of the test set."""


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy of logits `(n, k)` against labels `(n,)`, in percent.

    Range 0 to 100; up is better on what remains, down on what is forgotten. Raises `ValueError` if there is no sample.
    """
    if len(labels) == 0:
        raise ValueError("An accuracy needs at least one sample. Is a split empty?")
    return 100.0 * (logits.argmax(-1) == labels).double().mean().item()


def harmonic_mean(acc_f: float, acc_r: float) -> float:
    """2 (100 − acc_f) acc_r / ((100 − acc_f) + acc_r), from accuracies in percent (MoRE, appendix B.3).

    Range 0 to 100, up is better; 0 where nothing is forgotten or nothing kept. HM takes the training splits, HM_t the test splits.
    """
    forgotten = 100.0 - acc_f
    return 2 * forgotten * acc_r / (forgotten + acc_r) if forgotten + acc_r > 0 else 0.0


def kd_scores(accuracies: Mapping[str, float]) -> dict[str, float]:
    """`acc_f acc_r acc_ft acc_rt hm hm_t`, in percent, from the accuracy of each split."""
    scores = {f"acc_{split}": accuracies[split] for split in SPLITS}
    return {
        **scores,
        "hm": harmonic_mean(scores["acc_f"], scores["acc_r"]),
        "hm_t": harmonic_mean(scores["acc_ft"], scores["acc_rt"]),
    }


def auc(positive: Tensor, negative: Tensor, *, resolution: float = 0.0) -> float:
    """The probability that a score of `positive` `(n,)` is above one of `negative` `(m,)`, ties counted half, in percent.

    Range 0 to 100; 50 says that the scores do not tell the two apart, and needs no prior, no threshold and no chance to break ties.

    Args:
        positive, negative (`Tensor`): scores.
        resolution (`float`, defaults to 0): scores are rounded to multiples of it. A difference that is zero in theory is not in
            floating point, and what is left of it would be ranked as if it were evidence.
    """
    scores = torch.cat([positive, negative]).double()
    if resolution:
        scores = (scores / resolution).round()
    _, ranked, counts = scores.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - (counts - 1) / 2  # the mean rank of each distinct score, from 1
    n, m = len(positive), len(negative)
    return 100.0 * ((middle[ranked[:n]].sum() - n * (n + 1) / 2) / (n * m)).item()


def expert_load(experts: Tensor, num_experts: int) -> dict[str, object]:
    """How evenly a router spreads samples: from the experts `(n,)` that they took.

    Returns `shares`, the percent of samples of each expert (they add up to 100), and `cv`, their standard deviation over their mean:
    0 is even, down is better, at most √(num_experts − 1). (MoRE, appendix D.3, says variance over mean, which grows with the samples.)
    """
    counts = torch.bincount(experts, minlength=num_experts).double()
    shares = counts / counts.sum()
    return {"shares": (100 * shares).tolist(), "cv": float(shares.std(correction=0) / shares.mean())}
