"""The erasure of one model, as `get_erasure` returns it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import AlreadyErasedError, IncompatibleBaseError
from .facts import Facts
from .markdown import aligned_text, bare_table
from .proof import SLACK
from .remap import EXACT, Remap
from .request import Request
from .site import Site


# The measurements of `Remap.verify` that must be 0 up to rounding; the others say what an edit costs.
GUARANTEES = ("forget_to_target", "remain_fixed", "idempotent", "nothing_left")


@dataclass(eq=False)
class Erasure(ABC):
    """
    One erasure of one model. A live object; do not change it.

    Args:
        request (`Request`):
            What was asked for. A refit starts from it.
        facts (`Facts`):
            What was measured and decided.
        sites (`dict[str, Site]`):
            The edited layers.
        remaps (`dict[str, Remap]`):
            The factors for each feature space; empty for a model that was loaded without them.
        originals (`dict[str, Tensor]`, *optional*):
            The layers' weights before the edit, on the CPU; `None` if they were not kept.
        guarantees (`dict[str, float]`):
            The measurements of `Remap.verify`.
        proof (`dict[str, float]`):
            The measurements of the proof by run.
        hooks (`tuple[RoutingHook, ...]`):
            The routing hooks on the model; the first one has the router.
    """

    request: Request
    facts: Facts
    sites: dict[str, Site]
    remaps: dict[str, Remap] = field(repr=False)
    originals: dict[str, Tensor] | None = field(repr=False)
    guarantees: dict[str, float]
    proof: dict[str, float] = field(default_factory=dict)
    hooks: tuple[Any, ...] = field(default=(), repr=False)  # `core.hook` imports this module

    @property
    def concepts(self) -> list[str]:
        """The forgotten names."""
        return list(self.request.concepts)

    @property
    def router(self) -> str | None:
        """The router's name."""
        return self.request.router

    @property
    def remap(self) -> Remap | None:
        """The factors of the first space, the prompt's tokens or the first head's features."""
        return next(iter(self.remaps.values()), None)

    @property
    def rank(self) -> int:
        """The largest rank of an edited layer's change."""
        return max(remap.rank for remap in self.remaps.values())

    @property
    def hook(self) -> Any:
        """The routing hook that has the router."""
        return self.hooks[0] if self.hooks else None

    def remap_of(self, site: str) -> Remap:
        """The factors that edit this site."""
        return self.remaps[self.sites[site].space]

    def to_dict(self) -> dict[str, Any]:
        """Everything but tensors, ready for JSON."""
        return {
            **self.request.to_dict(),
            "sites": {name: list(site.read().shape) for name, site in self.sites.items()},
            "guarantees": self.guarantees,
            "proof": self.proof,
            **asdict(self.facts),
        }

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the report as pairs of a name and a finding."""

    def to_markdown(self) -> str:
        """A table of what was done and what was measured."""
        return bare_table(self.rows())

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __str__(self) -> str:
        return aligned_text(self.rows())

    def require_originals(self) -> dict[str, Tensor]:
        """The original weights. Raises `AlreadyErasedError` if they were not kept."""
        if self.originals is None:
            raise AlreadyErasedError(
                f"{', '.join(map(repr, self.concepts))} is already erased from this model and the original "
                "weights are not available, so it can be neither restored nor fitted jointly with another "
                f"concept. Start from {self.facts.base or 'the original model'} and pass all concepts at "
                "once."
            )
        return self.originals

    def check_unchanged(self) -> None:
        """
        Raises `IncompatibleBaseError` if a site's weight is no longer this edit, apart from a cast of the
        model.
        """
        originals = self.require_originals()
        changed = [name for name, original in originals.items() if not self._holds_edit(name, original)]
        if changed:
            raise IncompatibleBaseError(
                f"{len(changed)} of {len(self.sites)} edited layers changed since the edit (first: "
                f"`{changed[0]}`): a LoRA was fused or the model was trained. Undo that first "
                "(`pipe.unfuse_lora()`), or start from the base model."
            )

    def _holds_edit(self, name: str, original: Tensor) -> bool:
        weight = self.sites[name].read()
        merged = self.remap_of(name).merged(original.to(weight.device))
        # Another device sums in another order, and fusing and unfusing a LoRA leaves W + d − d.
        rtol = 4 * torch.finfo(weight.dtype).eps
        # A model that was cast down and up again holds the rounded values of either half precision.
        for dtype in (weight.dtype, torch.float16, torch.bfloat16):
            expected = merged.to(dtype).to(weight.dtype)
            if torch.allclose(weight, expected, rtol=rtol, atol=rtol * float(expected.abs().max())):
                return True
        return False


def measured_rows(guarantees: Mapping[str, float], proof: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the report's rows about measurements: guarantees with their bounds, then the proof by run."""
    for key, value in guarantees.items():
        if key.endswith(GUARANTEES):
            yield f"guarantee `{key}`", _compared(value, EXACT)
        elif not key.endswith("rank"):
            yield f"measured `{key}`", f"{value:.1e}"
    if "other_ways" in proof:
        found = "exact: no other layer reads the prompt"
        if proof["other_ways"] > 0:  # on a GPU
            found = (
                f"no other layer reads the prompt: another prompt moves the output by "
                f"{proof['other_ways']:.1e}, the same one again by {proof['spread']:.1e}"
            )
        yield "proof by run, other ways", found
    if "layer_changed" in proof:
        yield (
            "proof by run, edited layers",
            f"each computes with its edited weight, to {proof['layer_error']:.1f} times the rounding of one "
            f"layer (limit {SLACK}; with its old weight, at least {proof['layer_changed']:.0f})",
        )
    if "expert_error" in proof:
        yield (
            "proof by run, routing hooks",
            f"each expert is right to {proof['expert_error']:.1f} times the rounding of its features "
            f"(limit {SLACK})",
        )


def _compared(value: float, bound: float) -> str:
    return f"{value:.1e}, below {bound:.0e} ✓" if value < bound else f"{value:.1e}, not below {bound:.0e} ✗"
