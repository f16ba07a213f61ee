"""Linear probes of frozen features (knowledge retention): new heads, trained as in the paper or to the end.

All SGD probes of one feature extractor, every learning rate and every seed, are trained together on cached
features: each step is a pair of batched matrix products over the seeds, with the heads of all learning rates
side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .metrics import SPLITS, accuracy, auc, kd_scores


LEARNING_RATES = (0.1, 0.01, 0.001)  # the paper's
GATHER_STEPS = 32  # mini-batches gathered by one indexing call

TOLERANCE = 1e-6  # of the converged probe's gradient
LARGEST_HESSIAN = 2000  # numbers in a head that is small enough for Newton's method
SAMPLES = 100_000  # of which the converged probe takes the logits at once
APPROACH, ITERATIONS = 100, 1000  # L-BFGS iterations before Newton's method, and at most instead of it

# Log-odds that differ by less are a tie: the size of what is left where the difference is zero in theory.
RESOLUTION = 1e-3


@dataclass(frozen=True)
class Probe:
    """A linear head: logits = z `weight`ᵀ + `bias`, with `weight` `(k, d)` and `bias` `(k,)`."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features.to(self.weight) @ self.weight.T + self.bias


def new_heads(num_features: int, num_classes: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """Draw a head's first weight, Xavier normal.

    Returns:
        `tuple[Tensor, torch.Generator]`: the weight `(k, d)`, float32, and the generator that goes on to
            shuffle. Both are
        functions of the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(num_classes, num_features)
    return nn.init.xavier_normal_(weight, generator=generator), generator


def sgd_probes(
    features: Tensor | Callable[[int, int], Tensor],
    labels: Tensor,
    num_classes: int,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    epochs: int = 10,
    batch_size: int = 64,
) -> dict[tuple[float, int], Probe]:
    """Train new heads with plain SGD, as the paper measures knowledge retention (MoRE, appendix B.3):
    (learning rate, seed) to its probe. At 0.001 ten epochs do not get far: that probe is underfitted, and
    says little.

    As in ESC's `evaluate_KR`: Xavier normal weight, zero bias, cross-entropy, no momentum, no weight decay,
    constant learning rate, a new shuffle in each epoch. All learning rates of a seed share start and
    shuffles; every probe is the one that it would be alone.

    The features `(n, d)` are of forget and remain training samples together, or a function of epoch and seed
    that returns them: a stochastic layer is asked again in each epoch, separately for each probe seed.
    """
    drawn = features if callable(features) else lambda epoch, seed: features
    first = drawn(0, seeds[0]).float()
    device, rates = first.device, len(learning_rates)
    starts = [new_heads(first.shape[1], num_classes, seed) for seed in seeds]

    # The heads of all learning rates of a seed are stacked: (seeds, rates k, d).
    weight = torch.stack([start.repeat(rates, 1) for start, _ in starts]).to(device)
    bias = torch.zeros(len(seeds), rates * num_classes, 1, device=device)
    step_size = torch.tensor(learning_rates, device=device).repeat_interleave(num_classes)[:, None]
    one_hot = nn.functional.one_hot(labels.to(device), num_classes).float()
    for epoch in range(epochs):
        seen = []
        for seed in seeds:
            is_first = epoch == 0 and seed == seeds[0]
            seen.append(first if is_first else drawn(epoch, seed).float())
        orders = [torch.randperm(len(labels), generator=generator).to(device) for _, generator in starts]
        for x, y in batches(seen, one_hot, orders, batch_size):
            # Samples are the last dimension: a softmax over a strided one is the fast one.
            logits = torch.baddbmm(bias, weight, x.mT).unflatten(1, (rates, num_classes))
            gradient = (logits.softmax(2) - y).flatten(1, 2) * (step_size / x.shape[1])
            weight.baddbmm_(gradient, x, alpha=-1)
            bias -= gradient.sum(2, keepdim=True)

    weights = weight.unflatten(1, (rates, num_classes)).cpu()
    biases = bias[..., 0].unflatten(1, (rates, num_classes)).cpu()
    probes = {}
    for i, rate in enumerate(learning_rates):
        for j, seed in enumerate(seeds):
            probes[rate, seed] = Probe(weights[j, i], biases[j, i])
    return probes


def batches(
    features: Sequence[Tensor], targets: Tensor, orders: Sequence[Tensor], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features `(seeds, batch, d)` and targets `(seeds, 1, k, batch)` of each step, from the features
    `(n, d)` and the permutation `(n,)` of each seed.

    They are gathered for many steps at once: for one step alone, gathering takes longer than the step.
    """
    block = GATHER_STEPS * batch_size
    for parts in zip(*(order.split(block) for order in orders), strict=True):
        x = torch.stack([z[rows] for z, rows in zip(features, parts, strict=True)])
        y = torch.stack([targets[rows].T for rows in parts])[:, None]
        yield from zip(x.split(batch_size, 1), y.split(batch_size, 3), strict=True)


def converged_probe(features: Tensor, labels: Tensor, *, C: float = 1e4) -> Probe:
    """Fit the multinomial logistic regression of labels on features: the best linear head, at any cost;
    float64 on the CPU.

    It minimises the mean cross-entropy + ‖W‖² / (2 C n), with a free bias, on the features' device. Every
    class has a label at least once.
    """
    num_classes = int(labels.max()) + 1
    if num_classes * (features.shape[1] + 1) > LARGEST_HESSIAN:
        return _whitened_lbfgs(
            features.to(torch.float64, copy=True), labels.to(features.device), num_classes, C
        )

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, y = features.double().cpu().numpy(), labels.numpy()
    # For two classes scikit-learn fits the difference of the rows of W, whose square norm is twice ‖W‖².
    penalty = 2 * C if num_classes == 2 else C
    model = LogisticRegression(C=penalty, tol=TOLERANCE, max_iter=APPROACH, warm_start=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
    # Newton's method ends what L-BFGS has begun; alone it takes twice as long.
    model.set_params(solver="newton-cholesky").fit(x, y)
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if num_classes == 2:
        return Probe(torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2)
    return Probe(weight, bias)


def _whitened_lbfgs(x: Tensor, labels: Tensor, num_classes: int, C: float) -> Probe:
    """Fit a head that is too large for a Hessian.

    L-BFGS runs on whitened features, which changes the path and not the minimum: on the features themselves,
    as scikit-learn's, it is far from the minimum after thousands of iterations. They take the place of x: of
    a million, two copies would not fit into memory.
    """
    mean = x.mean(0)
    x -= mean
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    # Directions without variance keep a finite scale.
    scale = (values.clamp_min(0) + 1e-6 * values.max()).rsqrt()
    whiten = (vectors * scale) @ vectors.T
    for part in x.split(SAMPLES):
        part.copy_(part @ whiten)
    weight = x.new_zeros(num_classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (weight @ whiten).square().sum() / (2 * C * len(labels))
        value.backward()
        # The logits of a million samples and a thousand classes would not fit into memory at once.
        for z, y in zip(x.split(SAMPLES), labels.split(SAMPLES), strict=True):
            entropy = nn.functional.cross_entropy(z @ weight.T + bias, y, reduction="sum") / len(labels)
            entropy.backward()
            value = value + entropy.detach()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        original_weight = weight @ whiten
        return Probe(original_weight.cpu(), (bias - original_weight @ mean).cpu())


def probe_scores(
    probe: Probe,
    features: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    forget: Collection[int],
    targets: Collection[int] = (),
) -> dict[str, float]:
    """Measure what a probe recovers, by the features and labels of the splits `f r ft rt`: the accuracies and
    harmonic means of `kd_scores`, and on the test splits, in percent, with 50 for "cannot tell":

    - `auc_rest`: forget against all remaining samples, ranked by the probability of the forget classes;
    - `auc_target`: forget against samples of the targets, ranked by the log-odds of forget classes and
      targets, with ties below `RESOLUTION`. `nan` without targets.

    Unlike accuracies they do not depend on how many classes share a place: a share of 1/(experts + 1) loses
    every vote.
    """
    logits = {split: probe(features[split]) for split in SPLITS}
    scores = kd_scores({split: accuracy(logits[split].cpu(), labels[split].cpu()) for split in SPLITS})
    log_p_ft, log_p_rt = (logits[split].double().log_softmax(-1) for split in ("ft", "rt"))
    forget, targets = list(forget), list(targets)
    rest = [c for c in range(log_p_ft.shape[1]) if c not in forget]

    def forget_auc(others: list[int], negative: Tensor) -> float:
        ours, theirs = (_log_odds(log_p, forget, others) for log_p in (log_p_ft, negative))
        return auc(ours, theirs, resolution=RESOLUTION)

    scores["auc_rest"] = forget_auc(rest, log_p_rt)
    scores["auc_target"] = float("nan")
    if targets:
        of_target = torch.isin(labels["rt"].cpu(), torch.tensor(targets)).to(log_p_rt.device)
        scores["auc_target"] = forget_auc(targets, log_p_rt[of_target])
    return scores


def _log_odds(log_p: Tensor, some: list[int], others: list[int]) -> Tensor:
    return log_p[:, some].logsumexp(-1) - log_p[:, others].logsumexp(-1)
