"""
Gates in feed-forward layers: two hidden units open on a concept's own features, and write a step.

Wherever a layer comes to read features of the concept, by whatever word, the gate

    g = clamp((d·x − θ) / σ, 0, 1)

opens and what the layer writes gets g times the step; elsewhere it is shut, so that others pay next to
nothing. With gelu, two units compute it: (gelu(s z) − gelu(s z − s)) / s is nearly clamp(z, 0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, one_hot

from .moment import Moment


SHARPNESS = 8.0  # s, of the gate's two corners


@dataclass(frozen=True)
class Gate:
    """
    One gate; float64 on the CPU.

    Args:
        reader (`Tensor`): d `(width,)`.
        threshold (`float`), scale (`float`): θ, and σ, the standard deviation of d·x over the concept.
        step (`Tensor`): what the layer writes in addition where the gate is open, `(out,)`.
    """

    reader: Tensor
    threshold: float
    scale: float
    step: Tensor

    @classmethod
    def shut_at(cls, share: float, said: Tensor, reader: Tensor, scale: float, step: Tensor) -> Gate:
        """The gate that stays shut at this share of what d said of features that did not fit it, `(n,)`."""
        threshold = float(said.kthvalue(int(share * (len(said) - 1)) + 1).values)
        return cls(reader, threshold, scale, step)

    def __call__(self, x: Tensor) -> Tensor:
        """How far the two units open the gate at features `(..., width)`, in their dtype."""
        z = SHARPNESS / self.scale * (x @ self.reader.to(x) - self.threshold)
        return (gelu(z) - gelu(z - SHARPNESS)) / SHARPNESS


def fit_reader(own: Moment, others: Moment, shrinkage: float = 0.2) -> tuple[Tensor, float]:
    """
    Fisher's discriminant of a concept's features against others', with their pooled covariance: d and σ.

    Args:
        own (`Moment`), others (`Moment`):
            Of features with a 1 behind them, so that they hold the means, too.
        shrinkage (`float`, *optional*, defaults to 0.2):
            Added to the covariance's diagonal, as a fraction of its trace over its width.
    """
    (mean, spread), (others_mean, others_spread) = (_mean_and_covariance(one) for one in (own, others))
    pooled = (spread + others_spread) / 2
    pooled.diagonal().add_(shrinkage * pooled.trace() / len(pooled))
    reader = torch.linalg.solve(pooled, mean - others_mean)
    return reader, float((reader @ spread @ reader).sqrt())


def _mean_and_covariance(moment: Moment) -> tuple[Tensor, Tensor]:
    dense = moment.dense
    mean = dense[:-1, -1]
    return mean, dense[:-1, :-1] - mean.outer(mean)


@dataclass(frozen=True)
class Rewrite:
    """
    The change B A of one layer's weight by gates; float64 on the CPU.

    Args:
        lora_A (`Tensor`), lora_B (`Tensor`): `(rank, d)` and `(out, rank)`.
        asked (`Tensor`): what a proof by run asks the layer, `(n, d)`.
    """

    lora_A: Tensor
    lora_B: Tensor
    asked: Tensor

    @property
    def rank(self) -> int:
        """The rank of the change."""
        return len(self.lora_A)

    def merged(self, weight: Tensor) -> Tensor:
        """The edited weight `(out, d)` as a new tensor of the same dtype. Computed in float64, cast once."""
        lora_A, lora_B = self.lora_A.to(weight.device), self.lora_B.to(weight.device)
        return torch.addmm(weight.double(), lora_B, lora_A).to(weight.dtype)


def written(gates: Sequence[Gate], front: Tensor, behind: Tensor, energy: Tensor) -> tuple[Rewrite, Rewrite]:
    """
    The changes of a feed-forward layer's two weights that put each gate into two units of it: those that
    write least, by ‖w_j‖² E h_j². Nothing is written yet.

    Args:
        gates (`Sequence[Gate]`):
            The gates, of which there are at most half as many as units.
        front (`Tensor`):
            Weight and bias `[W | b]` of the layer that reads: `(units, width + 1)` for a GELU, or with a
            GEGLU `(2 units, width + 1)`, the values before what the gelu takes.
        behind (`Tensor`):
            The weight of the layer that writes, `(out, units)`.
        energy (`Tensor`):
            E h_j² of each hidden unit over ordinary pictures, `(units,)`.
    """
    front, behind = front.cpu().double(), behind.cpu().double()
    count = behind.shape[1]
    units = (behind.square().sum(0) * energy.cpu().double()).argsort(stable=True)[: 2 * len(gates)]
    # 1. The two units of a gate read s (d·x − θ) / σ, and that less s.
    reading, asked = [], []
    for gate in gates:
        scaled = SHARPNESS / gate.scale * torch.cat([gate.reader, gate.reader.new_tensor([-gate.threshold])])
        lower = scaled.clone()
        lower[-1] -= SHARPNESS
        reading += [scaled, lower]
        # asked below its threshold, at it and above
        along = gate.reader / gate.reader.square().sum()
        asked += [torch.cat([z * along, along.new_ones(1)]) for z in _around(gate)]
    rows, new = units, torch.stack(reading)
    if len(front) == 2 * count:
        # 2. Of a GEGLU, the value that these are multiplied with is 1.
        ones = torch.zeros_like(new)
        ones[:, -1] = 1
        rows, new = torch.cat([units, units + count]), torch.cat([ones, new])
    readers = Rewrite(new - front[rows], _selectors(rows, len(front)).T, torch.stack(asked))
    # 3. The step, once with each sign.
    steps = torch.stack([sign * gate.step / SHARPNESS for gate in gates for sign in (1, -1)], 1)
    selectors = _selectors(units, count)
    asked_behind = SHARPNESS * torch.cat([selectors, torch.ones_like(selectors[:1])])
    return readers, Rewrite(selectors, steps - behind[:, units], asked_behind)


def _around(gate: Gate) -> list[float]:
    """Readings below a gate's threshold, at it and above."""
    return [gate.threshold + z * gate.scale for z in (-2, 0, 2)]


def _selectors(rows: Tensor, count: int) -> Tensor:
    """`(n, count)`, float64: row i is 1 at the i-th of these numbers."""
    return one_hot(rows, count).double()
