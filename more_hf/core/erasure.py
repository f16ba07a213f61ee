"""The erasure of one model, as `get_erasure` returns it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .claims import Claim
from .errors import AlreadyErasedError, IncompatibleBaseError
from .facts import Facts
from .gate import Rewrite
from .markdown import aligned_text, bare_table
from .remap import Remap
from .report import explained
from .request import Request
from .site import Site


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
        rewrites (`dict[str, Rewrite]`):
            The changes of layers that have gates, by layer; these read no space of features.
    """

    request: Request
    facts: Facts
    sites: dict[str, Site]
    remaps: dict[str, Remap] = field(repr=False)
    originals: dict[str, Tensor] | None = field(repr=False)
    guarantees: dict[str, float]
    proof: dict[str, float] = field(default_factory=dict)
    hooks: tuple[Any, ...] = field(default=(), repr=False)  # `core.hook` imports this module
    rewrites: dict[str, Rewrite] = field(default_factory=dict, repr=False)

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

    def remap_of(self, site: str) -> Remap | Rewrite:
        """The factors that edit this site."""
        return self.rewrites[site] if site in self.rewrites else self.remaps[self.sites[site].space]

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
    def claims(self) -> Iterator[Claim]:
        """Yield what may be said of the erasure, by what was done and measured."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the report as pairs of a name and a finding."""

    def to_markdown(self) -> str:
        """A table of what was done and what was measured."""
        return bare_table(self.rows())

    def explain(self) -> str:
        """A table with a line for each row of the report: what it says, what is good, and what to do."""
        return explained(name for name, _ in self.rows())

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __str__(self) -> str:
        return aligned_text([*self.rows(), ("what these mean", "`.explain()`, and more_hf/report.md")])

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
        model, and `SiteNotFoundError` if it was quantized since.
        """
        for site in self.sites.values():
            site.check()
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
