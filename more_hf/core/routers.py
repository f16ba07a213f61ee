"""Routers decide which expert a sample takes. Each is a class; `ROUTERS` maps names to classes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import PrototypeError
from .remap import Remap


# splitmix64's constants, as signed 64-bit integers. The draw is a hash of (seed, call) rather than a
# generator: torch.compile can trace it, it disturbs nobody's random numbers, and it is the same on every
# device and for every batch size.
_CONSTANTS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_GOLDEN, _MIX1, _MIX2 = (constant - (1 << 64) for constant in _CONSTANTS)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of signed 64-bit integers (torch's `>>` keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(seeds: Tensor, call: Tensor) -> Tensor:
    """Pseudo-random non-negative integers from int64 seeds `(n,)` and an int64 call index `()`."""
    x = seeds * _MIX1 + (call + 1) * _GOLDEN
    # splitmix64's finalizer
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return _shift_right(x ^ _shift_right(x, 31), 1)


class RandomRouter:
    """
    The paper's router: one uniform draw per call and sample.

    With `seeds`, the expert of sample i in call c is a function of `seeds[i]` and c alone; rows beyond
    `len(seeds)` repeat them, so that the halves of classifier-free guidance share their draws. Without
    `seeds`, every row has its own stream, which is new in each process.
    """

    def __init__(self, remap: Remap, device: torch.device | str = "cpu"):
        self.num_experts = remap.num_experts
        self.entropy = torch.tensor(secrets.randbits(62), device=device)
        self.seeds: Tensor | None = None
        self.call = torch.zeros((), dtype=torch.int64, device=device)

    def reset(self, seeds: Sequence[int] | None) -> None:
        """Start again at call 0 with these streams."""
        self.seeds = None
        if seeds is not None:
            # an int64 holds no larger seed
            self.seeds = torch.tensor([seed % 2**63 for seed in seeds], device=self.call.device)
        self.call.zero_()

    def __call__(self, z: Tensor) -> Tensor:
        """Experts `(batch,)`, int64, for features `(batch, ..., d)`."""
        rows = torch.arange(len(z), device=self.call.device)
        # Rows beyond the seeds repeat them: both halves of guidance take the same expert.
        seeds = self.entropy + rows if self.seeds is None else self.seeds[rows % len(self.seeds)]
        experts = mix(seeds, self.call) % self.num_experts
        self.call += 1
        return experts.to(z.device)


class HashRouter:
    """
    Gives the same sample the same expert every time: a function of (I − P D) z, the part that no expert
    changes.

    This part of the sample's mean feature (over all tokens but the first) is compared with one fixed random
    direction per expert. If hardly anything of it is left (z near a prototype), the sample takes expert 0.

    Raises:
        `PrototypeError`: there are as many prototypes as dimensions, so that no such part exists.
    """

    def __init__(self, remap: Remap, device: torch.device | str = "cpu"):
        P = remap.prototypes.matrix
        if P.shape[1] >= len(P):
            raise PrototypeError(
                f"{P.shape[1]} prototypes fill all {len(P)} dimensions, so experts leave no part of a sample "
                'unchanged by which to tell samples apart. Choose router="random", or solver="covariance", '
                "which keeps fewer prototypes exactly."
            )
        # What I − P D leaves of a feature no prototype reads, so every expert maps it to itself.
        complement = torch.eye(len(P), dtype=P.dtype) - P @ remap.dual
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(remap.num_experts, len(P), dtype=P.dtype, generator=generator)
        self.complement = complement.to(device)
        self.directions = directions.to(device)
        # relative to the prototypes, because experts change ‖z‖ itself
        self.tiny = 1e-3 * float(P.norm(dim=0).median())

    def reset(self, seeds: Sequence[int] | None) -> None:
        """Nothing is drawn, so there is nothing to start again."""

    def __call__(self, z: Tensor) -> Tensor:
        """Experts `(batch,)`, int64, for features `(batch, tokens, d)` or `(batch, d)`."""
        unchanged = _sample_feature(z.to(self.complement)) @ self.complement.T
        experts = (unchanged @ self.directions.T).argmax(1)
        # the largest of numbers that are all rounding would be arbitrary
        return experts.where(unchanged.norm(dim=1) > self.tiny, 0)


class PrototypeRouter:
    """
    MoRE-P: picks the expert whose row of the remain prototypes' pseudo-inverse responds most (Algorithm 4).

    That is argmax W z of the sample's mean feature z, with W = (P_R⁺)[:num_experts]; `weight` `(rows, d)` may
    be trained. P_R⁺ has one row per remain prototype, so experts beyond that number have no row and are never
    picked, as in Algorithm 4.
    """

    def __init__(self, remap: Remap, device: torch.device | str = "cpu"):
        self.weight = self.initial(remap).float().to(device)

    @staticmethod
    def initial(remap: Remap) -> Tensor:
        """The untrained weight, float64."""
        return torch.linalg.pinv(remap.remain)[: remap.num_experts]

    def reset(self, seeds: Sequence[int] | None) -> None:
        """Nothing is drawn, so there is nothing to start again."""

    def __call__(self, z: Tensor) -> Tensor:
        """Experts `(batch,)`, int64, for features `(batch, tokens, d)` or `(batch, d)`."""
        return (_sample_feature(z).to(self.weight) @ self.weight.T).argmax(1).to(z.device)


class RandomPrototypeRouter(PrototypeRouter):
    """MoRE-R: the same, with W drawn once from N(0, 0.1²)."""

    @staticmethod
    def initial(remap: Remap) -> Tensor:
        """The untrained weight, float64."""
        shape = remap.num_experts, len(remap.prototypes.matrix)
        return 0.1 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _sample_feature(z: Tensor) -> Tensor:
    """`(batch, d)`: the mean over a sample's tokens except the first, which is the same in every prompt."""
    return z[:, 1:].mean(1) if z.ndim == 3 else z


ROUTERS = {
    "random": RandomRouter,
    "hash": HashRouter,
    "prototype": PrototypeRouter,
    "prototype_random": RandomPrototypeRouter,
}
