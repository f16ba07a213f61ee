"""
Methods beside each other, on the pictures that all of them have: who wins, by the number of names that are
forgotten at once, and by the words that ask for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ..bootstrap import ClusterBootstrap, Estimate
from ..columns import rounded
from ..methods.registry import DIFFUSION, UNREGISTERED
from .config import ARTISTS, Kind
from .summary import CLUSTERS, numbers


STYLE_GONE = 10.0  # the artist may still be recognized in this percentage of the forgotten pictures
CONTENT_KEPT = 90.0  # percent of what was recognized before

Line = Mapping[str, Any]


def contenders(methods: Iterable[str]) -> list[str]:
    """The methods that can win, each once: all but the controls."""
    return [method for method in dict.fromkeys(methods) if not _is_control(method)]


def _is_control(method: str) -> bool:
    return DIFFUSION.get(method, UNREGISTERED).role == "control"


def shared_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the pictures that every method has, so that methods are compared on equal terms."""
    methods = rows.groupby(["forget", "case_number", "sample"])["method"].transform("nunique")
    return rows[methods == rows["method"].nunique()]


def rank(rows: pd.DataFrame, kind: Kind = ARTISTS, size: int = 1) -> list[dict[str, Any]]:
    """
    Rank the methods by `lpips_d`, those that qualify first, on the pictures that every method has of erasures
    of `size` names. Empty with fewer than two methods besides the controls, or without judges.

    Returns:
        `list[dict[str, Any]]`: a line per method. `qualifies` is `"yes"` if the forgotten concept is still
        recognized in at most 10 % of its pictures, and the content to be spared (`Kind.spared`) in at least
        90 % of the pictures that had it before; else `"no"`; `"control"` for a control, which cannot win.
        `gone_f` and `gone_r` are the percent of the forgotten pictures, and of the others, in which their
        artist or thing is recognized, `kept_f` that of the forgotten pictures that show what else the prompt
        asks for. `behind` is how far `lpips_d` is below the first line's, with its paired 95 % interval; a
        tie if it contains 0.
    """
    shared = shared_rows(rows)
    shared = shared[shared["names"].map(len) == size]
    judged = shared[shared["is_forgotten"]][["style_after", "content_after"]].dropna()
    if len(contenders(rows["method"])) < 2 or judged.empty:
        return []
    draws = ClusterBootstrap(shared[CLUSTERS])
    ranked = [_ranked(*each, draws, kind) for each in shared.groupby("method", sort=False)]
    order = ("yes", "no", "control")
    ranked.sort(key=lambda each: (order.index(each[0]["qualifies"]), -each[0]["lpips_d"]))
    for line, lpips_d in ranked:
        behind = ranked[0][1] - lpips_d
        low, high = behind.interval
        line |= {"behind": behind.value, "behind_low": low, "behind_high": high}
    return [line for line, _ in ranked]


def _ranked(
    method: str, rows: pd.DataFrame, draws: ClusterBootstrap, kind: Kind
) -> tuple[dict[str, Any], Estimate]:
    """A method's line but for `behind`, and its `lpips_d`."""
    pictures = {"f": rows[rows["is_forgotten"]]}
    pictures["r"] = rows[(rows["concept"] != "") & ~rows["is_forgotten"]]
    line: dict[str, Any] = {"method": method, "erasures": rows["forget"].nunique(), "qualifies": "control"}
    for name, which in (("gone", "f"), ("kept", "f"), ("gone", "r")):
        before, after = (draws.mean(pictures[which][f"{name}_{when}"]) for when in ("before", "after"))
        line[f"{name}_{which}_before"] = before.value
        line[f"{name}_{which}"] = after.value
    lpips = {which: draws.mean(own["lpips"]) for which, own in pictures.items()}
    lpips["d"] = lpips["f"] - lpips["r"]
    line |= {f"lpips_{which}": estimate.value for which, estimate in lpips.items()}
    if not _is_control(method):
        spared = "kept_f" if kind.spared == "f" else "gone_r"
        is_kept = line[spared] >= CONTENT_KEPT / 100 * line[f"{spared}_before"]
        line["qualifies"] = "yes" if line["gone_f"] <= STYLE_GONE and is_kept else "no"
    return line, lpips["d"]


def winner(ranking: Sequence[Line], kind: Kind = ARTISTS) -> str:
    """Say in one sentence which method is first, and which are tied with it."""
    condition = kind.condition.format(STYLE_GONE, CONTENT_KEPT)
    qualified = [line for line in ranking if line["qualifies"] == "yes"]
    if not qualified:
        return f"Nobody. A winner would have to {condition}."
    first = qualified[0]
    tied = [line["method"] for line in qualified[1:] if line["behind_low"] <= 0]
    ties = f", tied with {', '.join(tied)}" if tied else ""
    erasures = "one erasure" if first["erasures"] == 1 else f"{first['erasures']} erasures"
    return (
        f"{first['method']}{ties}, over {erasures}. Of the methods that {condition}, it has the largest "
        f"lpips_d: how much further the forgotten {kind.one}'s pictures moved than the others'. Ties are by "
        "paired 95 % intervals over prompts."
    )


def rank_sizes(rows: pd.DataFrame, kind: Kind = ARTISTS) -> list[dict[str, Any]]:
    """The rankings over all erasures of as many names, with their number in the column `at_once`."""
    lines = []
    for size in sorted(rows["names"].map(len).unique()):
        lines += [{"at_once": int(size), **line} for line in rank(rows, kind, size)]
    return lines


def level_lines(rows: pd.DataFrame, kind: Kind = ARTISTS) -> list[dict[str, Any]]:
    """
    How much of a forgotten concept comes back when it is asked for in other words: a line for each level, in
    the order of the prompts, and method, over all erasures, on the pictures that every method has. Empty if
    the prompts have no levels, or if no picture exists yet for every method.

    `left` is what is recognized of the forgotten pictures in percent of before (`gone_f`, `gone_f_before`),
    `lost` the part of what the others show (`shown_r_before`, `shown_r`) that is no longer recognized: their
    artist or thing, or, at a level that names none, whatever else the prompt asks for.
    """
    levels = rows.sort_values("case_number", kind="stable")["level"].unique().tolist()
    shared = shared_rows(rows)
    if levels == [""] or shared.empty:
        return []
    draws = ClusterBootstrap(shared[CLUSTERS])
    lines = []
    for level, method in itertools.product(levels, rows["method"].unique()):
        own = shared[(shared["level"] == level) & (shared["method"] == method)]
        if len(own):
            lines.append(_level_line(level, method, own, draws, kind))
    return lines


def _level_line(
    level: str, method: str, rows: pd.DataFrame, draws: ClusterBootstrap, kind: Kind
) -> dict[str, Any]:
    forgotten, others = rows[rows["is_forgotten"]], rows[~rows["is_forgotten"]]
    # A prompt without an artist asks for no style, so there it counts whether the thing is still drawn.
    shown = "gone" if (others["concept"] != "").any() else "kept"
    gone = [draws.mean(forgotten[f"gone_{when}"]) for when in ("before", "after")]
    show = [draws.mean(others[f"{shown}_{when}"]) for when in ("before", "after")]
    line: dict[str, Any] = {"level": level, "method": method, "n_f": len(forgotten), "n_r": len(others)}
    line |= {"gone_f_before": gone[0].value, "gone_f": gone[1].value}
    line |= numbers("left", gone[1].percent_of(gone[0]))
    line |= {"shown_r_before": show[0].value, "shown_r": show[1].value}
    line |= numbers("lost", (show[0] - show[1]).percent_of(show[0]))
    line |= {"lpips_f": draws.mean(forgotten["lpips"]).value, "lpips_r": draws.mean(others["lpips"]).value}
    return rounded(line)
