"""
The proof by run: ask the real model, inside a pass, whether every edited layer computes with its edited
weight and every routing hook hands on what its expert makes of a feature.

Each is asked by itself and judged by the rounding of one layer in its dtype. A concept and a target that lie
close together hardly differ as features. But a layer is asked for the directions that the edit reads, at a
prototype's length, and there an old weight is off by hundreds of roundings in every dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from .errors import SiteNotFoundError
from .remap import Remap
from .site import Site, feature_dim


SLACK = 4  # how many roundings one layer, or one expert's features, may be off
TRIED_EXPERTS = 8
# The unit roundoff of float32 matrix products, by `torch.set_float32_matmul_precision`.
FLOAT32_ROUNDOFF = {"highest": 2**-24, "high": 2**-11, "medium": 2**-8}
TINY = torch.finfo(torch.float64).tiny


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """
    The unit roundoffs of a linear layer in this dtype: of its output, relative to the output, and of its
    sums, relative to the sum of their terms' sizes. Half precisions are summed up in float32.
    """
    if dtype == torch.float32:
        unit = FLOAT32_ROUNDOFF[torch.get_float32_matmul_precision()]
        return unit, unit
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps / 2, torch.finfo(sums).eps / 2


def probes(remap: Remap) -> Tensor:
    """What an edited layer is asked, `(n, d)`: what its edit reads, at a usual length, and what stays."""
    # Orthonormal, because close prototypes give long, nearly opposite rows of D_F.
    directions = torch.linalg.qr(remap.D_F.T).Q.T * remap.prototypes.matrix.norm(dim=0).mean()
    return torch.cat([directions, remap.remain.T])


@dataclass
class Measurements:
    """What a proof by run measures while the edited model runs once."""

    # how far each edited layer's answer is off, in units of its rounding
    layers: dict[str, float] = field(default_factory=dict)
    # how far its answer would be off with the original weight, in the same units
    changed: dict[str, float] = field(default_factory=dict)
    # how far each expert's features are off behind the routing hook, in units of their rounding
    experts: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def ask_layer(self, site: Site, rows: Tensor, edited: Tensor, original: Tensor, like: Tensor) -> None:
        """
        Ask a layer for its answer to rows `(n, d)`, such as `probes`, with everything that is attached to it.
        Of an `AffineSite`, they end in 1.
        `edited` and `original` are its weight `(out_features, d)` with the edit merged, in its dtype, and
        before; `like` is on the device and in the dtype of the features that it reads.
        """
        # 1. The layer's answer. Columns behind the edited ones read something else: nothing here.
        rows = rows.to(like)
        dim = feature_dim(site.module)
        picture = site.features(rows)[None, :, None]  # one pixel wide, for a convolution
        answer = site.module(picture.movedim(-1, dim)).movedim(dim, -1)[0, :, 0]
        dtype = max(like.dtype, answer.dtype, key=lambda dtype: torch.finfo(dtype).eps)  # autocast may differ
        answer = answer.double()
        # 2. What both weights give, in float64.
        bias = site.read_bias()
        bias = None if bias is None else bias.to(answer)
        expected = linear(rows.double(), edited.to(answer), bias)
        before = linear(rows.double(), original.to(answer), bias)
        # 3. Compare row by row, in units of what the layer rounds: its output and its sums. The edit may send
        # a row to zero, so the larger of the two outputs gives the scale.
        of_output, of_sums = rounding(dtype)
        terms = linear(rows.double().abs(), torch.maximum(edited.abs(), original.to(edited).abs()).to(answer))
        size = torch.maximum(expected.norm(dim=1), before.norm(dim=1))
        unit = of_output * size + of_sums * terms.norm(dim=1)
        self.layers[site.name] = _worst(answer - expected, unit)
        self.changed[site.name] = _worst(expected - before, unit)

    def compare_routed(self, name: str, routed: Tensor, z: Tensor, remap: Remap, expert: int | None) -> None:
        """Compare what a hook handed on for features z, in the model's dtype, with E_e z; both `(..., d)`."""
        routed, z, dtype = routed.cpu().double(), z.cpu().double(), z.dtype
        expected = remap.apply(z, expert)
        # The hook computes in float32 and rounds once. Its sums grow with the factors: D_F is long where
        # prototypes are close.
        of_output, of_sums = torch.finfo(dtype).eps / 2, rounding(torch.float32)[1]
        growth = 1 + remap.D_F.norm() * remap.shift(expert).norm()
        # the expert may send a feature to zero, so the larger of the two gives the scale
        size = torch.maximum(z.norm(dim=-1), expected.norm(dim=-1))
        unit = of_output * size + of_sums * growth * z.norm(dim=-1)
        self.experts[name] = _worst(routed - expected, unit)

    def require_edited(self, names: Mapping[str, Site]) -> dict[str, float]:
        """
        The worst of what was measured, `layer_error`, `layer_changed` and, with a router, `expert_error`.

        Raises:
            `SiteNotFoundError`: a layer was not called, or a layer or an expert is off by more than rounding.
        """
        # A layer that was never asked proves nothing, however right the others are.
        if silent := [name for name in names if name not in self.layers]:
            raise SiteNotFoundError(
                f"The proof by run failed: {len(silent)} of {len(names)} edited layers are not called when "
                f"the model runs (first: `{silent[0]}`), so something else reads in their place, or nothing "
                "does. The edit was rolled back. Remove custom attention processors and adapters, and erase."
            )
        # every comparison is written so that a NaN fails
        wrong = {name: error for name, error in self.layers.items() if not error < SLACK}
        if wrong:
            worst = max(wrong, key=wrong.get)
            raise SiteNotFoundError(
                f"The proof by run failed: {len(wrong)} of {len(names)} edited layers do not compute with "
                f"their edited weight (`{worst}` is off by {wrong[worst]:.2g} times the rounding of one "
                f"layer; with its old weight it would be by {self.changed[worst]:.2g}). The edit was rolled "
                "back. Remove adapters, hooks and offloading, erase, and put them back."
            )
        if wrong := {name: error for name, error in self.experts.items() if not error < SLACK}:
            worst = max(wrong, key=wrong.get)
            raise SiteNotFoundError(
                f"The proof by run failed: behind the routing hook, {worst} is off by {wrong[worst]:.2g} "
                "times the rounding of its features. The edit was rolled back. Remove hooks of your own from "
                "the module, erase, and put them back."
            )
        measured = {"layer_error": max(self.layers.values(), default=0.0)}
        if self.changed:
            measured["layer_changed"] = min(self.changed.values())
        if self.experts:
            measured["expert_error"] = max(self.experts.values())
        return measured


def _worst(difference: Tensor, unit: Tensor) -> float:
    """The largest row of differences, in units."""
    return float((difference.norm(dim=-1) / unit.clamp_min(TINY)).max())
