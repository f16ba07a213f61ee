"""Membership inference: telling forgotten training samples from samples that the model never saw.

The three attacks have three names here, because papers print all of them as "MIA".
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..bootstrap import draw_counts, interval
from .metrics import auc


SHADOW = 1000  # samples of each kind for a support vector machine, whose time grows with their square


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of each sample, in nats: `(n,)` from logits `(n, k)` and labels `(n,)`."""
    return torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the probability of each sample's own label: `(n,)`, 0 to 1."""
    return (-sample_losses(logits, labels)).exp()


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute −(1 − p_y) log p_y − Σ_{i≠y} p_i log(1 − p_i) of each sample (Song and Mittal, 2021).

    A widely copied version takes log p_i for log(1 − p_i), and one column for the whole batch.

    Args:
        logits (`Tensor`): `(n, k)`.
        labels (`Tensor`): `(n,)`.

    Returns:
        `Tensor`: `(n,)`, in nats, from 0 (sure and right) upwards. Both logarithms are clamped at log 1e-30.
    """
    p = logits.double().softmax(-1)
    own = torch.nn.functional.one_hot(labels, p.shape[1]).bool()
    own_terms = -(1 - p) * p.clamp_min(1e-30).log()
    other_terms = -p * (1 - p).clamp_min(1e-30).log()
    return torch.where(own, own_terms, other_terms).sum(-1)


def loss_attack(forget: Tensor, unseen: Tensor, *, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Attack with logistic regression on the loss alone: forgotten samples against unseen ones.

    MoRE's appendix B.3, as ESC and SCRUB implement it: the longer side is cut at random to the shorter, then
    the mean accuracy over five stratified splits, 90 % to fit and 10 % to test.

    Args:
        forget (`Tensor`), unseen (`Tensor`): losses `(n,)`, `(m,)` of the two sides, of the same classes.
        seed (`int`, defaults to 0): of the cut, the splits and the bootstrap.
        draws (`int`, defaults to 2000): of the bootstrap over the samples that were tested.

    Returns:
        `dict[str, float]`: `mia_loss` with `mia_loss_low` and `mia_loss_high`, in percent, 50 is ideal, down
            is better (100
        also tells all apart); and `mia_loss_auc`, the area under the ROC curve of the lower loss, in percent,
        50 is ideal, which needs no fit.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit

    generator = np.random.default_rng(seed)
    n = min(len(forget), len(unseen))
    sides = [np.asarray(side.double())[generator.permutation(len(side))[:n]] for side in (forget, unseen)]
    x, y = np.concatenate(sides)[:, None], np.repeat([1, 0], n)
    right, tested = np.zeros(2 * n), np.zeros(2 * n)
    accuracies = []
    for fit, test in StratifiedShuffleSplit(5, test_size=0.1, random_state=seed).split(x, y):
        hits = LogisticRegression().fit(x[fit], y[fit]).predict(x[test]) == y[test]
        accuracies.append(hits.mean())
        right[test] += hits
        tested[test] += 1

    # A sample may have been tested several times: draw samples, not tests.
    used = tested > 0
    counts = draw_counts([used.sum()], draws, generator)
    low, high = interval(counts @ right[used] / (counts @ tested[used]))
    return {
        "mia_loss": 100 * float(np.mean(accuracies)),
        "mia_loss_low": 100 * low,
        "mia_loss_high": 100 * high,
        "mia_loss_auc": auc(-forget, -unseen),
    }


def shadow_attack(seen: Tensor, unseen: Tensor, forget: Tensor, *, seed: int = 0) -> float:
    """Attack with a support vector machine on one number per sample.

    It is fitted on remaining training samples against test samples, and asked about the forgotten ones: the
    attack of SalUn and l1-sparse (C 3, RBF kernel, gamma "auto"). With `confidence` it is the variant that
    their papers print, with `modified_entropy` the one that Song and Mittal argue for.

    Args:
        seen (`Tensor`), unseen (`Tensor`), forget (`Tensor`): `(n,)`, `(m,)`, `(l,)`. Of the first two the
            same number is drawn at random, at most `SHADOW`.
        seed (`int`, defaults to 0): of that draw.

    Returns:
        `float`: the percent of `forget` taken for *not* members ("forget efficacy"). Up is better, and the
            comparison is
        with Retrain's value; for a class that is predicted wrongly it is near 100 whatever the model still
        knows.
    """
    from sklearn.svm import SVC

    generator = np.random.default_rng(seed)
    n = min(len(seen), len(unseen), SHADOW)
    sides = [np.asarray(side.double())[generator.permutation(len(side))[:n]] for side in (seen, unseen)]
    attacker = SVC(C=3, kernel="rbf", gamma="auto")
    attacker.fit(np.concatenate(sides)[:, None], np.repeat([1, 0], n))
    return 100 * float(1 - attacker.predict(np.asarray(forget.double())[:, None]).mean())
