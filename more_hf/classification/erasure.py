"""The record of one classifier's erasure, as `get_erasure` returns it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.erasure import Erasure
from ..core.prototypes import Prototypes


@dataclass
class ClassErasure(Erasure):
    """An `Erasure` of classes. `request["remap_to"]` holds what was asked for, `facts["sent_to"]` the targets that were drawn.

    Attributes:
        prototypes (`Prototypes`, *optional*): of every class, which `restore` of single classes fits from; `None` for a model that
            was loaded.
    """

    prototypes: Prototypes | None = field(default=None, repr=False)

    @property
    def num_classes(self) -> int:
        return self.facts["num_classes"]

    def to_markdown(self) -> str:
        """A table of what was done and what was measured."""
        request, facts = self.request, self.facts
        sent = {name: ", ".join(targets) or "nothing (projected out)" for name, targets in facts["sent_to"].items()}
        at, moved = request["at"], facts["remain_moved"]
        edited = ", ".join(f"`{name}`" for name in request["head"])
        rows = [
            ("forgotten", ", ".join(self.concepts)),
            ("sent to", "; ".join(f"{name} → {target}" for name, target in sent.items())),
            ("remaining classes", _moved(moved)),
            ("solver", f"{facts['solver']}: {facts['solver_reason']}"),
            ("edited", f"a hook on `{at}` only, **not erased at rest**" if at else f"{edited}, in the weight and by a hook on its input"),
            ("rank", f"{facts['rank']}; {facts['num_experts']} expert(s)"),
            ("router", request["router"] or "none: the mean expert"),
            ("condition number of P", f"{facts['condition_number']:.1f}"),
            *((f"guarantee `{key}`", f"{value:.1e}") for key, value in self.guarantees.items() if key != "rank"),
            *((f"proof by run `{key}`", f"{value:.1e}") for key, value in self.proof.items()),
            ("leak", "the backbone is untouched: without the hook, features are the original's"),
        ]
        if request["router"] == "random":
            rows.append(("leak", "asking twice undoes random routing: two experts on the same image determine its feature"))
        return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _moved(moved: dict[str, float]) -> str:
    if not moved:
        return "exactly where they were"
    worst = "; ".join(f"{name} by {100 * value:.2g} %" for name, value in list(moved.items())[:5])
    return f"the targets exactly where they were; the others moved least in the metric of the features, most of all {worst}"
