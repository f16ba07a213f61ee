"""The rows of a report about measurements, and what each row of a report means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .proof import SLACK
from .remap import EXACT


# The measurements of `Remap.verify` that must be 0 up to rounding; the others say what an edit costs.
GUARANTEES = ("forget_to_target", "remain_fixed", "idempotent", "nothing_left")
PAGE = Path(__file__).parents[1] / "report.md"
KIND = re.compile(r"`(pooled|layers|denoiser)_")  # the kind of space in the name of a measurement


def explained(names: Iterable[str]) -> str:
    """
    The lines of the page `report.md` about these rows of a report, as a Markdown table. Rows that only
    somebody else's record has are left out.
    """
    head, rule, *lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    by_name = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    found = [by_name.get(name) or by_name.get(KIND.sub("`", name), head) for name in names]
    return "\n".join(dict.fromkeys([head, rule, *found]))


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
