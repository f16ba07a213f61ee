"""Who wins: the largest `lpips_d` among the methods that remove the style and keep the content, by paired intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..methods.registry import DIFFUSION, UNREGISTERED
from .summary import JOINT, Bootstrap, Row, content_of, is_forgotten, style_of


STYLE_GONE = 10.0  # percent of the forgotten artist's pictures that may still be recognised
CONTENT_KEPT = 90.0  # percent of what was recognised before
ORDER = ("yes", "no", "control")


def rank(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line per method, on the pictures that every method has of erasures of a single artist: those that qualify first, by `lpips_d`.

    A method qualifies with `style_f` of at most 10 % and `content_f` of at least 90 % of its value before; controls never do. `behind`
    is how far `lpips_d` is below the first line's, `_low` and `_high` its 95 % bootstrap interval with the same draws of prompts for
    both; an interval that holds 0 is a tie. Empty with fewer than two methods beside the controls, or where pictures were not judged.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    single = [row for row in rows if JOINT not in row["forget"]]
    common = set.intersection(*({_case(row) for row in single if row["method"] == method} for method in methods))
    shared = [row for row in single if _case(row) in common]
    if len([method for method in methods if not _is_control(method)]) < 2 or not any(map(_judged, shared)):
        return []
    draws, drawn, lines = Bootstrap(shared), {}, []
    for method in methods:
        own = [row for row in shared if row["method"] == method]
        forgotten = [row for row in own if is_forgotten(row)]
        others = [row for row in own if row["artist"] and not is_forgotten(row)]
        (far, far_drawn), (near, near_drawn) = (draws.mean(part, lambda row: row["lpips"]) for part in (forgotten, others))
        style, _ = draws.mean(forgotten, lambda row: style_of(row, "after"))
        (before, _), (after, _) = (draws.mean(forgotten, lambda row, w=when: content_of(row, w)) for when in ("before", "after"))
        drawn[method] = far_drawn - near_drawn
        gone, kept = style <= STYLE_GONE, after >= CONTENT_KEPT / 100 * before
        lines.append(
            {
                "method": method,
                "erasures": len({row["forget"] for row in own}),
                "qualifies": "control" if _is_control(method) else "yes" if gone and kept else "no",
                "style_f": float(style),
                "content_f_before": float(before),
                "content_f": float(after),
                "lpips_f": float(far),
                "lpips_r": float(near),
                "lpips_d": float(far - near),
            }
        )
    lines.sort(key=lambda line: (ORDER.index(line["qualifies"]), -line["lpips_d"]))
    first = lines[0]
    for line in lines:
        line["behind"] = first["lpips_d"] - line["lpips_d"]
        interval = np.quantile(drawn[first["method"]] - drawn[line["method"]], (0.025, 0.975))
        line["behind_low"], line["behind_high"] = interval.tolist()
    return lines


def _is_control(method: str) -> bool:
    return DIFFUSION.get(method, UNREGISTERED).role == "control"


def _case(row: Row) -> tuple:
    return row["forget"], row["case_number"], row["sample"]


def _judged(row: Row) -> bool:
    return is_forgotten(row) and row["style_after"] != "" and row["content_after"] is not None


def winner(ranking: Sequence[dict[str, Any]]) -> str:
    """What the ranking says, in one sentence."""
    asked = f"style_f of at most {STYLE_GONE:g} % and content_f of at least {CONTENT_KEPT:g} % of before"
    first, *others = [line for line in ranking if line["qualifies"] == "yes"] or [None]
    if first is None:
        return f"No method has {asked}."
    tied = [line["method"] for line in others if line["behind_low"] <= 0]
    ties = f", tied with {', '.join(tied)}" if tied else ""
    return (
        f"Over {first['erasures']} erasure(s), among the methods with {asked}, {first['method']} has the largest lpips_d{ties}, by paired "
        "95 % intervals over prompts."
    )
