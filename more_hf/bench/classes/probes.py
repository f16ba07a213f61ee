"""Linear probes of a frozen feature extractor (knowledge retention): a new head, as the paper trains it, and one trained to the end.

All probes of one feature extractor, every learning rate and every seed, are trained together on cached features: each step is a pair
of batched matrix products over the seeds, with the heads of all learning rates side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .metrics import SPLITS, accuracy, auc, kd_scores


LEARNING_RATES = (0.1, 0.01, 0.001)  # the paper's
PICKED = 32  # steps whose samples are picked together
ITERATIONS = 1000  # at most, of the converged probe
APPROACH, CURVED = 30, 2000  # iterations before its curvature is taken; numbers of a head that is small enough for that
RESOLUTION = 1e-3  # log-odds that differ by less are a tie: what the optimiser and L2 leave where the difference is zero in theory


@dataclass(frozen=True)
class Probe:
    """A linear head: logits = z `weight`ᵀ + `bias`, with `weight` `(k, d)` and `bias` `(k,)`."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features.to(self.weight) @ self.weight.T + self.bias


def new_heads(num_features: int, num_classes: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """A head's first weight `(k, d)`, float32, Xavier normal, and the generator that goes on to shuffle: both a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return nn.init.xavier_normal_(torch.empty(num_classes, num_features), generator=generator), generator


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
    """Train new heads with plain SGD, as the paper measures knowledge retention (MoRE, appendix B.3; ESC's `evaluate_KR`).

    Xavier normal weight, zero bias, cross-entropy, no momentum, no weight decay, constant learning rate, a new shuffle in each epoch.
    All learning rates of a seed share start and shuffles, and every probe gets the numbers that it would get alone.

    Args:
        features (`Tensor` or `Callable`): `(n, d)` of forget and remain training samples together, or a function of epoch and seed
            that returns them: a stochastic layer is asked again in each epoch, separately for each probe seed.
        labels (`Tensor`): `(n,)`, int64.
        num_classes (`int`): k.
        learning_rates (`Sequence[float]`), seeds (`Sequence[int]`), epochs (`int`), batch_size (`int`): of the paper by default.

    Returns a probe for each `(learning rate, seed)`. At 0.001 ten epochs do not get far: that probe is underfitted, and says little.
    """
    drawn = features if callable(features) else lambda epoch, seed: features
    first = drawn(0, seeds[0]).float()
    started = [new_heads(first.shape[1], num_classes, seed) for seed in seeds]
    L, k = len(learning_rates), num_classes
    weight = torch.stack([start.repeat(L, 1) for start, _ in started]).to(first.device)  # (seeds, L k, d)
    bias = torch.zeros(len(seeds), L * k, 1, device=first.device)
    rates = torch.tensor(learning_rates, device=first.device).repeat_interleave(k)[:, None]  # (L k, 1)
    one_hot = nn.functional.one_hot(labels.to(first.device), k).float()
    for epoch in range(epochs):
        seen = [(first if (epoch, seed) == (0, seeds[0]) else drawn(epoch, seed).float()) for seed in seeds]
        orders = [torch.randperm(len(labels), generator=generator).to(first.device) for _, generator in started]
        for x, y in batches(seen, one_hot, orders, batch_size):
            logits = torch.baddbmm(bias, weight, x.mT).unflatten(1, (L, k))  # samples last: a softmax over a stride is the fast one
            gradient = (logits.softmax(2) - y).flatten(1, 2) * (rates / x.shape[1])
            weight.baddbmm_(gradient, x, alpha=-1)
            bias -= gradient.sum(2, keepdim=True)
    weights, biases = weight.unflatten(1, (L, k)).cpu(), bias[..., 0].unflatten(1, (L, k)).cpu()
    return {(lr, seed): Probe(weights[s, i], biases[s, i]) for i, lr in enumerate(learning_rates) for s, seed in enumerate(seeds)}


def batches(features: Sequence[Tensor], targets: Tensor, orders: Sequence[Tensor], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features `(seeds, batch, d)` and targets `(seeds, 1, k, batch)` of each step, from an order `(n,)` for each seed.

    They are picked for many steps at once: for one step at a time the picking would take longer than the step.
    """
    block = PICKED * batch_size
    for parts in zip(*(order.split(block) for order in orders), strict=True):
        x = torch.stack([z[rows] for z, rows in zip(features, parts, strict=True)])
        y = torch.stack([targets[rows].T for rows in parts])[:, None]
        yield from zip(x.split(batch_size, 1), y.split(batch_size, 3), strict=True)


def converged_probe(features: Tensor, labels: Tensor, num_classes: int, *, C: float = 1e4, tolerance: float = 1e-6) -> Probe:
    """The multinomial logistic regression of `labels` `(n,)` on `features` `(n, d)`: the best linear head, whatever it takes.

    Minimises the mean cross-entropy + ‖W‖² / (2 C n), bias free: scikit-learn's objective. L-BFGS in float64 on whitened features,
    which changes the path and not the minimum, until no entry of the gradient is above `tolerance` (or `ITERATIONS` are done). A head
    of at most `CURVED` numbers is whitened again where it is after `APPROACH` iterations, with the curvature there: a tenth of the time.
    """
    x, n = features.double(), len(labels)
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / n)
    whiten = (vectors * (values.clamp_min(0) + 1e-6 * values.max() + 1e-30).rsqrt()) @ vectors.T
    white = torch.cat([(x - mean) @ whiten, x.new_ones(n, 1)], dim=1)  # the last number of each row of a head is its bias
    labels, shape = labels.to(x.device), (num_classes, white.shape[1])

    def loss(head: Tensor) -> Tensor:
        return nn.functional.cross_entropy(white @ head.T, labels) + (head[:, :-1] @ whiten).square().sum() / (2 * C * n)

    def minimised(start: Tensor, metric: Callable[[Tensor], Tensor], iterations: int) -> Tensor:
        """L-BFGS over `step` in `start` + `metric(step)`."""
        step = torch.zeros_like(start, requires_grad=True)
        stop = {"max_iter": iterations, "tolerance_grad": tolerance, "tolerance_change": 1e-14}
        optimizer = torch.optim.LBFGS([step], **stop, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(start + metric(step))
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(closure)
        return start + metric(step.detach())

    head = x.new_zeros(shape)
    if head.numel() <= CURVED:
        head = minimised(head, lambda step: step, APPROACH)
        penalty = torch.block_diag(whiten @ whiten.T, x.new_zeros(1, 1)) / (C * n)
        values, vectors = torch.linalg.eigh(curvature(white, head) + torch.block_diag(*[penalty] * num_classes))
        scale = vectors * values.clamp_min(1e-6 * values.max()).rsqrt()
        head = minimised(head, lambda step: (scale @ step.flatten()).view(shape), ITERATIONS)
    else:
        head = minimised(head, lambda step: step, ITERATIONS)
    weight = head[:, :-1] @ whiten
    return Probe(weight, head[:, -1] - weight @ mean)


def curvature(x: Tensor, head: Tensor) -> Tensor:
    """The Hessian `(k d, k d)` of the mean cross-entropy of logits `x headᵀ`, for `x` `(n, d)` and `head` `(k, d)`. It needs no labels.

    Products are in float32, which is enough for a change of coordinates; 4096 samples at a time.
    """
    k, d = head.shape
    found = x.new_zeros(k * d, k * d)
    for part in x.split(4096):
        p = (part @ head.T).softmax(1).float()
        part = part.float()
        each = (p[:, :, None] * part[:, None]).flatten(1)  # (batch, k d)
        found -= (each.T @ each).double()
        for c, block in enumerate((each.T @ part).double().split(d)):
            found[c * d : (c + 1) * d, c * d : (c + 1) * d] += block
    return found / len(x)


def probe_scores(
    probe: Probe, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], forget: Collection[int], targets: Collection[int] = ()
) -> dict[str, float]:
    """What a probe recovers, from features `(n, d)` and labels `(n,)` of the splits `f r ft rt`.

    Returns the accuracies and harmonic means of `kd_scores`, and on the test splits, in percent, with 50 for "cannot tell":

    - `auc_rest`: forget against all remaining samples, ranked by the probability of the forget classes;
    - `auc_target`: forget against samples of the targets, ranked by the log-odds of forget classes and targets, with ties below
      `RESOLUTION`. `nan` without targets.

    Unlike accuracies they do not depend on how many classes share a place: a share of 1/(experts + 1) loses every vote.
    """
    logits = {split: probe(features[split]) for split in SPLITS}
    scores = kd_scores({split: accuracy(logits[split].cpu(), labels[split].cpu()) for split in SPLITS})
    forget, targets = list(forget), list(targets)
    log_p = {split: logits[split].double().log_softmax(-1) for split in ("ft", "rt")}
    odds = {split: _log_odds(p, forget, [c for c in range(p.shape[1]) if c not in forget]) for split, p in log_p.items()}
    scores["auc_rest"] = auc(odds["ft"], odds["rt"], resolution=RESOLUTION)
    scores["auc_target"] = float("nan")
    if targets:
        odds = {split: _log_odds(p, forget, targets) for split, p in log_p.items()}
        of_target = torch.isin(labels["rt"].cpu(), torch.tensor(targets)).to(odds["rt"].device)
        scores["auc_target"] = auc(odds["ft"], odds["rt"][of_target], resolution=RESOLUTION)
    return scores


def _log_odds(log_p: Tensor, some: Sequence[int], others: Sequence[int]) -> Tensor:
    return log_p[:, list(some)].logsumexp(-1) - log_p[:, list(others)].logsumexp(-1)
