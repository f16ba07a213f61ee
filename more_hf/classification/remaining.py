"""What an edit costs the classes that stay, measured before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.erasure import Erasure
from ..core.prototypes import Prototypes


DRAWN = 4000  # features in all: a percentage is known to about one point
TRIED_EXPERTS = 8


def remaining_right(
    erasure: Erasure, prototypes: Prototypes, names: Sequence[str]
) -> dict[str, float] | None:
    """
    Estimate the percentage of the remaining classes' features that the head gives to their class, `before`
    the edit and `after`; `None` where no other class has a prototype. Nothing need be written yet.

    The features are drawn: normal around each class's prototype, with the covariance within classes, which is
    the second moment without the part of the prototypes. Where no second moment is known, the prototypes
    alone. With a router, up to eight experts take turns. The prototypes `(d, k)` have the features of several
    heads, whose mean is the logits, concatenated; the names are in the order of the logits.
    """
    # 1. The classes that stay, each as often as another, and their features.
    stays = [name for name in prototypes.names if name in names and name not in erasure.concepts]
    if not stays:
        return None
    columns = [prototypes.index(name) for name in stays]
    repeats = max(1, DRAWN // len(stays))
    drawn = torch.tensor(columns).repeat_interleave(repeats)
    labels = torch.tensor([names.index(name) for name in stays]).repeat_interleave(repeats)
    noise = torch.randn(len(drawn), len(prototypes.matrix), generator=torch.Generator().manual_seed(0))
    z = prototypes.matrix.T[drawn] + noise.double() @ _within(prototypes)

    # 2. The logits of each head, with the edit and without.
    before, after, start = 0, 0, 0
    for name, site in erasure.sites.items():
        weight, bias = erasure.originals[name].double(), site.read_bias()
        bias = 0 if bias is None else bias.double().cpu()
        part = z[:, start : start + weight.shape[1]]
        start += weight.shape[1]
        before = before + part @ weight.T + bias
        after = after + _moved(erasure, name, part) @ weight.T + bias
    return {
        when: 100 * float((logits.argmax(1) == labels).double().mean())
        for when, logits in (("before", before), ("after", after))
    }


def _moved(erasure: Erasure, name: str, z: Tensor) -> Tensor:
    """E z for features `(n, d)` of a head."""
    remap = erasure.remaps[name]
    if erasure.router is None:
        return remap.apply(z)
    moved, turns = torch.empty_like(z), min(remap.num_experts, TRIED_EXPERTS)
    for expert in range(turns):
        moved[expert::turns] = remap.apply(z[expert::turns], expert)
    return moved


def _within(prototypes: Prototypes) -> Tensor:
    """The symmetric root of the covariance within classes, `(d, d)`; 0 where no second moment is known."""
    P = prototypes.matrix
    if prototypes.second_moment is None:
        return P.new_zeros(len(P), len(P))
    shares = prototypes.counts / prototypes.counts.sum()
    values, vectors = torch.linalg.eigh(prototypes.second_moment - (P * shares) @ P.T)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
