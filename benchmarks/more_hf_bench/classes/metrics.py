"""Numbers of knowledge deletion: accuracies, harmonic means, areas under ROC curves, the load of experts, the
similarity of features (pure functions, float64), and membership inference: telling forgotten training samples
from samples that the model never saw.

The three attacks on membership have three names here, because papers print all of them as "MIA".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..bootstrap import draw_counts, interval


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
    """Compute the probability in percent that a score of `positive` is above one of `negative`, ties counted
    half; 50 says that the scores do not tell the two apart. It needs no prior, no threshold and no chance to
    break ties.

    Scores are rounded to multiples of `resolution`: a difference that is zero in theory is not zero in
    floating point, and its remainder would be ranked as if it were evidence.
    """
    from sklearn.metrics import roc_auc_score

    scores = torch.cat([positive, negative]).double()
    if resolution:
        scores = (scores / resolution).round()
    return 100.0 * float(roc_auc_score([1] * len(positive) + [0] * len(negative), scores))


def expert_load(experts: Tensor, num_experts: int) -> float:
    """Measure how unevenly a router spreads samples, from the experts `(n,)` that they took.

    Returns:
        `float`: the coefficient of variation of the experts' shares: 0 is even, down is better, at most
            √(num_experts − 1). Appendix D.3 of MoRE says variance over mean, which grows with the number of
            samples, but the numbers of its Table 15 are this.
    """
    counts = torch.bincount(experts, minlength=num_experts).double()
    shares = counts / counts.sum()
    return float(shares.std(correction=0) / shares.mean())


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


SHADOW = 1000  # samples of each kind for a support vector machine, whose time grows with their square


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of each sample, in nats: `(n,)` from logits `(n, k)` and labels `(n,)`."""
    return torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the probability of each sample's own label: `(n,)`, 0 to 1."""
    return (-sample_losses(logits, labels)).exp()


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute −(1 − p_y) log p_y − Σ_{i≠y} p_i log(1 − p_i) of each sample (Song and Mittal, 2021): `(n,)`,
    in nats, from 0 (sure and right) upwards. Both logarithms are clamped at log 1e-30.

    A widely copied version takes log p_i for log(1 − p_i), and one column for the whole batch.
    """
    p = logits.double().softmax(-1)
    own = torch.nn.functional.one_hot(labels, p.shape[1]).bool()
    own_terms = -(1 - p) * p.clamp_min(1e-30).log()
    other_terms = -p * (1 - p).clamp_min(1e-30).log()
    return torch.where(own, own_terms, other_terms).sum(-1)


def loss_attack(forget: Tensor, unseen: Tensor, *, seed: int = 0) -> dict[str, float]:
    """Attack with logistic regression on the loss alone: forgotten samples against unseen ones of the same
    classes.

    MoRE's appendix B.3, as ESC and SCRUB implement it: the longer side is cut at random to the shorter, then
    the mean accuracy over five stratified splits, 90 % to fit and 10 % to test. `seed` is of the cut, the
    splits and the bootstrap over the tested samples.

    Returns `mia_loss` with `mia_loss_low` and `mia_loss_high`, in percent, 50 is ideal, down is better (100
    also tells all apart); and `mia_loss_auc`, the area under the ROC curve of the lower loss, in percent, 50
    is ideal, which needs no fit.
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
    counts = draw_counts([used.sum()], 2000, generator)
    low, high = interval(counts @ right[used] / (counts @ tested[used]))
    return {
        "mia_loss": 100 * float(np.mean(accuracies)),
        "mia_loss_low": 100 * low,
        "mia_loss_high": 100 * high,
        "mia_loss_auc": auc(-forget, -unseen),
    }


def shadow_attack(seen: Tensor, unseen: Tensor, forget: Tensor) -> float:
    """Attack with a support vector machine on one number per sample: the percent of `forget` taken for *not*
    members ("forget efficacy"). Up is better, and the comparison is with Retrain's value; for a class that is
    predicted wrongly it is near 100 whatever the model still knows.

    It is fitted on remaining training samples against test samples, the same number of both drawn at random,
    at most `SHADOW`, and asked about the forgotten ones: the attack of SalUn and l1-sparse (C 3, RBF kernel,
    gamma "auto"). With `confidence` it is the variant that their papers print, with `modified_entropy` the
    one that Song and Mittal argue for.
    """
    from sklearn.svm import SVC

    generator = np.random.default_rng(0)
    n = min(len(seen), len(unseen), SHADOW)
    sides = [np.asarray(side.double())[generator.permutation(len(side))[:n]] for side in (seen, unseen)]
    attacker = SVC(C=3, kernel="rbf", gamma="auto")
    attacker.fit(np.concatenate(sides)[:, None], np.repeat([1, 0], n))
    return 100 * float(1 - attacker.predict(np.asarray(forget.double())[:, None]).mean())
