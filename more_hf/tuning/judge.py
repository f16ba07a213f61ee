"""Judge pictures by the model itself: no one else's judge knows what a user's model draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from ..core.errors import MoreError
from ..data import load_lpips


FOLDS = 4  # of the pictures that a judge is fitted on, to measure it on pictures that it did not see
PENALTY = 1e-3  # of the squared weights, in the mean log loss
SIDES = (128, 256)  # pixels: AlexNet's first stride would lose the thin lines of smaller pictures
BATCH = 64
Z = 1.959964  # standard deviations on each side in a 95 % interval
CHANCE = 0.025  # what is at least as likely by chance says nothing
FLIPS = 10_000  # random signs that stand for all of them


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` pictures with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def share(cls, hits: int, n: int) -> Self:
        """A share of pictures, with Wilson's interval, which holds for none and all of them, too."""
        p, square = hits / n, Z * Z / n
        center = (p + square / 2) / (1 + square)
        half = Z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
        return cls(p, max(0.0, center - half), min(1.0, center + half), n)

    @classmethod
    def mean(cls, values: Tensor) -> Self:
        """A mean with the interval of the normal distribution; `n` must be at least 2."""
        values = values.double()
        mean, half = float(values.mean()), Z * float(values.std() / math.sqrt(len(values)))
        return cls(mean, mean - half, mean + half, len(values))

    @property
    def percent(self) -> str:
        """A share in words."""
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"

    @property
    def distance(self) -> str:
        """A distance in words; none is negative."""
        return f"{self.value:.3f} ({max(0.0, self.low):.3f} to {self.high:.3f})"


@functools.lru_cache(maxsize=1)
def _network(device: torch.device) -> nn.Module:
    return load_lpips().to(device)


def lpips_distance(a: Tensor, b: Tensor, *, batch_size: int = BATCH) -> Tensor:
    """
    Measure LPIPS(alex) between two sets of pictures, uint8 `(n, 3, H, W)`, pair by pair: float32 `(n,)`, on
    the CPU; 0 for equal pictures.

    Raises:
        ValueError: the shapes differ, or the pictures are not uint8.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"Images differ in shape: {tuple(a.shape)} and {tuple(b.shape)}. "
            "Generate both sets with the same settings."
        )
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"LPIPS pairs are uint8 images in [0, 255]; got {a.dtype} and {b.dtype}.")
    metric = _network(a.device)
    distances = []
    with torch.no_grad():
        for x, y in zip(a.split(batch_size), b.split(batch_size), strict=True):
            distances.append(metric(x.float() / 127.5 - 1, y.float() / 127.5 - 1).flatten().cpu())
    return torch.cat(distances) if distances else torch.empty(0)


@torch.no_grad()
def pooled_features(network: nn.Module, pictures: Tensor, batch_size: int = BATCH) -> Tensor:
    """
    Describe pictures `(n, 3, H, W)` in [-1, 1] by the mean, deviation and maximum of the five layers of
    LPIPS's AlexNet: `(n, 3456)`.
    """
    smallest, largest = SIDES
    side = min(max(smallest, *pictures.shape[-2:]), largest)
    rows = []
    for batch in pictures.split(batch_size):
        shrunk = batch.shape[-1] > side
        x = interpolate(batch, size=(side, side), mode="bilinear", align_corners=False, antialias=shrunk)
        pooled = []
        for h in network.net(network.scaling_layer(x)):
            pooled += [h.mean((2, 3)), h.std((2, 3)), h.amax((2, 3))]
        rows.append(torch.cat(pooled, dim=1))
    return torch.cat(rows)


def features_of(pictures: Tensor) -> Tensor:
    """`pooled_features` of uint8 pictures, float64, on the CPU."""
    return pooled_features(_network(pictures.device), pictures.float() / 127.5 - 1).double().cpu()


@dataclass(frozen=True, eq=False)
class Judge:
    """
    Says which of several names a picture shows: a multinomial logistic regression over the features of LPIPS,
    fitted on pictures that the model draws of these names. Frozen; on the CPU.

    Pictures come in cases: the same sentence around each name, and the same noise. What all names of a case
    have in common says nothing of any, so their mean is subtracted from whatever is judged in this case. And
    an edited picture may be the target's, which would be known again: each is judged by a regression that saw
    no picture of its case.

    Args:
        names (`tuple[str, ...]`):
            The names that it can tell apart.
        weight (`Tensor`), bias (`Tensor`):
            `(FOLDS, len(names), d)` and `(FOLDS, len(names))`, float64; the i-th saw no case whose number
            leaves the remainder i.
        centers (`Tensor`):
            `(cases, d)`: the mean features of each case.
        unseen (`Tensor`):
            `(len(names), cases, len(names))`: what each name scores on the pictures that it was fitted on, by
            the regression that did not see them.

    Example:

        >>> import torch
        >>> from more_hf.tuning.judge import Judge
        >>> dark = torch.randint(0, 90, (8, 3, 64, 64), dtype=torch.uint8)
        >>> judge = Judge.fit({"night": dark, "day": 255 - dark})
        >>> judge.recognized(dark, "night").value
        1.0
    """

    names: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    centers: Tensor
    unseen: Tensor

    @classmethod
    def fit(cls, pictures: Mapping[str, Tensor]) -> Judge:
        """
        Fit a judge, and measure it on the same cases. The same pictures give the same judge.

        Args:
            pictures (`Mapping[str, Tensor]`):
                For each name uint8 pictures `(n, 3, H, W)`; the i-th ones of all names are the i-th case.

        Raises:
            `MoreError`: there are fewer than two names or `FOLDS` cases, or names differ in their number.
        """
        return cls.of_features({name: features_of(own) for name, own in pictures.items()})

    @classmethod
    def of_features(cls, features: Mapping[str, Tensor]) -> Judge:
        """`fit`, by each name's features from `features_of`."""
        counts = {name: len(own) for name, own in features.items()}
        if len(counts) < 2 or len({*counts.values()}) > 1 or min(counts.values()) < FOLDS:
            raise MoreError(
                f"A judge needs as many pictures of each name, at least {FOLDS}, and at least two names, got "
                f"{', '.join(f'{count} of {name!r}' for name, count in counts.items()) or 'none'}. Draw more."
            )
        z = torch.stack(list(features.values()))  # (names, cases, d)
        cases, centers = z.shape[1], z.mean(0)
        fitted = []
        for fold in range(FOLDS):
            seen = torch.arange(cases) % FOLDS != fold
            fitted.append(fit_classes(z[:, seen] - centers[seen]))
        weight, bias = (torch.stack(parts) for parts in zip(*fitted, strict=True))
        judge = cls(tuple(features), weight, bias, centers, torch.empty(0))
        return replace(judge, unseen=torch.stack([judge.scores(own) for own in z]))

    def scores(self, features: Tensor, cases: Sequence[int] | None = None) -> Tensor:
        """What each name scores on pictures, by `features_of` them and their cases; by default in order."""
        cases = list(range(len(features)) if cases is None else cases)
        folds = torch.tensor(cases) % FOLDS
        centered = features - self.centers[cases]
        return (self.weight[folds] @ centered[..., None])[..., 0] + self.bias[folds]

    def taken_for(self, features: Tensor, cases: Sequence[int] | None = None) -> list[str]:
        """The name that each picture is taken for, by `features_of` it and its case; by default in order."""
        return [self.names[i] for i in self.scores(features, cases).argmax(1).tolist()]

    def recognized(self, pictures: Tensor, name: str, cases: Sequence[int] | None = None) -> Estimate:
        """
        The share of pictures that are taken for `name`, with Wilson's interval. Each was drawn in one of the
        cases that the judge was fitted on: by default the i-th picture in the i-th case.
        """
        return Estimate.share(self.taken_for(features_of(pictures), cases).count(name), len(pictures))

    @property
    def confusion(self) -> Tensor:
        """`(len(names), len(names))`: how many held-out pictures of a row's name are taken for a column's."""
        return torch.stack([row.bincount(minlength=len(self.names)) for row in self.unseen.argmax(2)])

    @property
    def accuracy(self) -> Estimate:
        """The share of held-out pictures that were taken for what they are."""
        return Estimate.share(int(self.confusion.diagonal().sum()), int(self.confusion.sum()))

    def found(self, name: str) -> Estimate:
        """The share of a name's held-out pictures that were taken for it."""
        row = self.confusion[self.names.index(name)]
        return Estimate.share(int(row[self.names.index(name)]), int(row.sum()))

    def mistaken(self, name: str) -> Estimate:
        """The share of the other names' held-out pictures that were taken for this one."""
        column = self.names.index(name)
        others = [i for i in range(len(self.names)) if i != column]
        return Estimate.share(int(self.confusion[others, column].sum()), int(self.confusion[others].sum()))

    def chance(self, name: str) -> float:
        """
        How likely a judge that knows nothing of a name would do as well with it: held-out pictures of all
        names in each case are put in order by the odds of the name, and its own should come first. Exact.
        """
        own, others = self.names.index(name), [i for i, other in enumerate(self.names) if other != name]
        odds = self.unseen[..., own] - self.unseen[..., others].logsumexp(2)  # (names, cases)
        behind = (odds[others] < odds[own]).sum(0)
        # By chance, every place is as likely as any other, and independent of those in the other cases.
        place = np.full(len(self.names), 1 / len(self.names))
        return float(functools.reduce(np.convolve, [place] * len(behind))[int(behind.sum()) :].sum())

    def can_tell(self, name: str) -> bool:
        """Whether it tells a name's pictures from the other names' better than by chance."""
        return self.chance(name) < CHANCE


def chance_of_moves(before: Tensor, after: Tensor) -> float:
    """
    How likely features `(cases, d)` would differ as much alike from case to case if what was drawn before and
    after were the same: then every difference could as well have the other sign.
    """
    moves = normalize((after - before) / torch.cat([before, after]).std(0).clamp_min(1e-9), dim=1)
    alike = moves @ moves.T
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (FLIPS, len(alike)), generator=generator).to(alike) * 2 - 1
    flipped = (signs @ alike * signs).sum(1)
    return (1 + int((flipped >= alike.sum()).sum())) / (1 + FLIPS)


def fit_classes(z: Tensor) -> tuple[Tensor, Tensor]:
    """
    Fit weight `(names, d)` and bias `(names,)` of the multinomial logistic regression over features `(names,
    cases, d)`, scaled to unit deviation, with the smallest mean log loss plus `PENALTY` times the squared
    weights.
    """
    names, cases, d = z.shape
    labels, z = torch.arange(names).repeat_interleave(cases), z.reshape(-1, d)
    # 1. There are fewer pictures than features, and the best weights lie in the span of the pictures, so that
    # an orthonormal basis of it gives the same solution in fewer dimensions.
    mean, deviation = z.mean(0), z.std(0).clamp_min(1e-9)
    x = (z - mean) / deviation
    basis = torch.linalg.svd(x, full_matrices=False).Vh
    x = x @ basis.T
    # 2. Minimize; the objective is convex.
    w = torch.zeros(names, x.shape[1] + 1, dtype=z.dtype, requires_grad=True)
    precise = {"max_iter": 300, "tolerance_grad": 1e-6, "tolerance_change": 0, "history_size": 20}
    optimizer = torch.optim.LBFGS([w], line_search_fn="strong_wolfe", **precise)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ w[:, :-1].T + w[:, -1], labels) + PENALTY * w[:, :-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    # 3. Back to the features as they are.
    weight = (w[:, :-1].detach() @ basis) / deviation
    return weight, w[:, -1].detach() - weight @ mean
