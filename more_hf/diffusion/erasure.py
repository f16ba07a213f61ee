"""The erasure of a pipeline, as `get_erasure` returns it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..core.claims import Claim, claims_of_concepts
from ..core.erasure import Erasure
from ..core.facts import ConceptFacts, is_text
from ..core.report import measured_rows
from ..core.request import ConceptRequest


@dataclass(eq=False)
class ConceptErasure(Erasure):
    """An `Erasure` of concepts from a text-to-image pipeline."""

    request: ConceptRequest
    facts: ConceptFacts

    def claims(self) -> Iterator[Claim]:
        """See `Erasure.claims`."""
        return claims_of_concepts(self.request, self.facts, self.guarantees, self.proof)

    def rows(self) -> Iterator[tuple[str, str]]:
        """See `Erasure.rows`."""
        request, facts = self.request, self.facts
        yield "forgotten", "; ".join(_with_aliases(name, also) for name, also in request.concepts.items())
        for name, given in request.given.items():
            name = f"{name}: {'without a name, ' if given.name is None else ''}"
            yield "given", f"{name}by {given.number} pictures, sha256 {given.sha256[:12]}"
        yield (
            "sent to",
            "; ".join(f"{name} → {_mean_of(targets)}" for name, targets in request.remap_to.items()),
        )
        moved = [f"{name} (moves by {100 * share:.2g} %)" for name, share in facts.retained_moved.items()]
        yield "retained", ", ".join(["special tokens and empty prompt (exact)", *moved])
        if request.strength != 1:
            yield "strength", f"{request.strength:g}: the change of each weight is multiplied by it"
        if request.named:
            yield "tokens", f"{facts.tokens}, of {request.tokens}" if facts.tokens else request.tokens
        yield "solver", f"{facts.solver}: {facts.solver_reason}"
        rank = f"rank {facts.rank}{' or less' if facts.spaces else ' each'}"
        yield "edited", f"{len(self.sites)} layers, {rank}; {facts.num_experts} expert(s)"
        if facts.dequantized:
            schemes = ", ".join(sorted(set(facts.dequantized.values())))
            yield (
                "kept plain",
                f"{len(facts.dequantized)} layers, quantized before ({schemes}) and not again: "
                f"{facts.extra_bytes / 1e6:.3g} MB more",
            )
        if request.inside:
            inside = [space for space in facts.spaces.values() if not is_text(space)]
            sampling = ", ".join(f"{name}={value}" for name, value in request.sampling.items())
            pictures = f"{request.pictures} pictures of each name" + (f" ({sampling})" if sampling else "")
            all_of_them = len(request.inside) == len(request.concepts)
            alone = "" if all_of_them else f", for {', '.join(request.inside)} alone"
            layers = f"{len(inside)} of these inside the denoiser{alone}"
            if request.gated:
                layers += f", with gates in {len(inside) // 2} feed-forward layers"
            yield "reach", f"{layers}, by {pictures}, softness {request.softness:g}"
        if any("," in precision for precision in facts.fitted_on.values()):
            yield "fitted on", "; ".join(f"{name} in {where}" for name, where in facts.fitted_on.items())
        yield "router", request.router or "none: the mean expert is in the weights"
        yield "condition number of P", f"{facts.condition_number:.1f}"
        yield from self.claims()
        yield from measured_rows(self.guarantees, self.proof)
        for leak in facts.leaks:
            yield "leak", leak


def _with_aliases(name: str, aliases: tuple[str, ...]) -> str:
    return f"{name} (also {', '.join(aliases)})" if aliases else name


def _mean_of(targets: tuple[str, ...]) -> str:
    if not targets:
        return "nothing (projected out)"
    return f"the mean of {', '.join(targets)}" if len(targets) > 1 else targets[0]
