"""The erasure of a classifier, as `get_erasure` returns it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..core.claims import Claim, claims_of_classes
from ..core.erasure import Erasure
from ..core.facts import ClassFacts
from ..core.prototypes import Prototypes
from ..core.report import measured_rows
from ..core.request import ClassRequest
from .accuracies import Accuracies


LISTED = 5  # classes that a row of a report names at most


@dataclass(eq=False)
class ClassErasure(Erasure):
    """
    An `Erasure` of classes. `request.remap_to` holds what was asked for, `facts.sent_to` the targets that
    were drawn.

    Args:
        prototypes (`Prototypes`, *optional*):
            Of every class, from which `restore` of single classes fits again; `None` for a model that was
            loaded.
    """

    request: ClassRequest
    facts: ClassFacts
    prototypes: Prototypes | None = field(default=None, repr=False)

    def claims(self) -> Iterator[Claim]:
        """See `Erasure.claims`."""
        return claims_of_classes(self.facts)

    def rows(self) -> Iterator[tuple[str, str]]:
        """See `Erasure.rows`."""
        request, facts = self.request, self.facts
        yield "forgotten", ", ".join(self.concepts)
        sent = [f"{name} → {_targets(targets, request.router)}" for name, targets in facts.sent_to.items()]
        yield "sent to", "; ".join(sent)
        yield "remaining classes", _movement(facts.remain_moved)
        if facts.remain_right is not None:
            before, after = facts.remain_right["before"], facts.remain_right["after"]
            estimate = f"{before:.1f} % before, {after:.1f} % after, of features drawn around the class means"
            yield "remaining classes recognized", estimate
        if facts.accuracy:
            yield from _measured(facts, self.concepts)
        yield "solver", f"{facts.solver}: {facts.solver_reason}"
        heads = ", ".join(f"`{name}`" for name in request.head)
        edited = f"{heads}, in the weight and by a hook on its input"
        yield "edited", f"a hook on `{request.at}` only, **not erased at rest**" if request.at else edited
        yield "rank", f"{facts.rank}; {facts.num_experts} expert(s)"
        yield "router", request.router or "none: the mean expert"
        yield "condition number of P", f"{facts.condition_number:.1f}"
        yield from self.claims()
        yield from measured_rows(self.guarantees, self.proof)
        yield "leak", "the backbone is untouched: without the hook, features are the original's"
        if request.router == "random":
            yield (
                "leak",
                "asking twice undoes random routing: two experts on the same image determine its feature",
            )


def _targets(names: list[str], router: str | None) -> str:
    if not names:
        return "nothing (projected out)"
    more = [f"{len(names) - LISTED} more"] if len(names) > LISTED else []
    listed = ", ".join([*names[:LISTED], *more])
    return f"the mean of {listed}" if len(names) > 1 and router is None else listed


def _measured(facts: ClassFacts, forgotten: list[str]) -> Iterator[tuple[str, str]]:
    """What `compare` found, in rows."""
    found = Accuracies.from_facts(facts.accuracy, forgotten)
    for row, one in (
        ("forgotten classes, measured", found.together(forgotten=True)),
        ("remaining classes, measured", found.together(forgotten=False)),
    ):
        if one is not None:
            yield row, f"{one.before:.1f} % right before, {one.after:.1f} % after, of {facts.measured_on}"
    became = []
    for name, takers in facts.became.items():
        listed = ", ".join(f"{taker} {share:.0f} %" for taker, share in takers.items())
        became.append(f"{name}: {listed}")
    yield "forgotten samples became", "; ".join(became) or "none was measured"
    lost = [f"{one.name} by {-one.change:.1f} points" for one in found.lost[:LISTED]]
    yield "lost most", "; ".join(lost) or "no class"


def _movement(moved: dict[str, float]) -> str:
    if not moved:
        return "exactly where they were"
    farthest = [f"{name} by {100 * share:.2g} %" for name, share in list(moved.items())[:LISTED]]
    return (
        "the targets exactly where they were; the others moved least in the metric of the features, "
        f"most of all {'; '.join(farthest)}"
    )
