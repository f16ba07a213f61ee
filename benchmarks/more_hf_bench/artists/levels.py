"""
How much of a forgotten concept comes back when it is asked for in other words: methods by prompt levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bootstrap import Estimate
from ..figures import write_figure
from .kinds import Kind
from .ranking import contenders, plot_method, shared_rows
from .rows import Row
from .summary import Statistics, both_means


@dataclass(frozen=True)
class LevelLine:
    """
    One method at one level, over all erasures, on the pictures that every method has: a line of `levels.csv`.

    Attributes:
        gone_f_before, gone_f (`float`, *optional*):
            Percent of the forgotten pictures in which their artist (or thing) is recognised; `None` if the
            level has no such pictures.
        left (`float`, *optional*):
            `gone_f` in percent of `gone_f_before`; `None` if it is not recognised before either.
        shown_r_before, shown_r (`float`, *optional*):
            Percent of the other pictures in which their artist (or thing) is recognised, or, at a level that
            names none, whatever else the prompt asks for.
        lost (`float`, *optional*):
            The part of `shown_r_before` that is no longer recognised, in percent.
        lpips_f, lpips_r (`float`, *optional*):
            How far the forgotten and the other pictures moved.
    """

    level: str
    method: str
    n_f: int
    n_r: int
    gone_f_before: float | None
    gone_f: float | None
    left: float | None
    left_low: float | None
    left_high: float | None
    shown_r_before: float | None
    shown_r: float | None
    lost: float | None
    lost_low: float | None
    lost_high: float | None
    lpips_f: float | None
    lpips_r: float | None


def level_lines(rows: Sequence[Row]) -> list[LevelLine]:
    """
    The lines of every level, in the order of the prompts; empty if the prompts have no levels, or if no
    picture exists yet for every method.
    """
    levels = list(dict.fromkeys(row.level for row in sorted(rows, key=lambda row: row.case_number)))
    shared = shared_rows(rows)
    if levels == [""] or not shared:
        return []
    statistics = Statistics(shared)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in shared:
        groups.setdefault((row.level, row.method), []).append(row)
    methods = dict.fromkeys(row.method for row in rows)
    lines = []
    for level, method in itertools.product(levels, methods):
        if (level, method) in groups:
            lines.append(_line(level, method, groups[level, method], statistics))
    return lines


def _line(level: str, method: str, rows: Sequence[Row], statistics: Statistics) -> LevelLine:
    forgotten = [row for row in rows if row.is_forgotten]
    others = [row for row in rows if not row.is_forgotten]
    kind = rows[0].kind
    # A prompt without an artist asks for no style, so there it counts whether the thing is still drawn.
    shown = kind.gone if any(row.concept for row in others) else kind.kept
    gone_before, gone = both_means(statistics, forgotten, getattr(Row, kind.gone))
    shown_before, still_shown = both_means(statistics, others, getattr(Row, shown))
    left = _percent(gone, gone_before)
    lost = None if still_shown is None else _percent(shown_before - still_shown, shown_before)
    return LevelLine(
        level=level,
        method=method,
        n_f=len(forgotten),
        n_r=len(others),
        gone_f_before=_value(gone_before),
        gone_f=_value(gone),
        **_with_interval("left", left),
        shown_r_before=_value(shown_before),
        shown_r=_value(still_shown),
        **_with_interval("lost", lost),
        lpips_f=_value(statistics.mean(forgotten, lambda row: row.lpips)),
        lpips_r=_value(statistics.mean(others, lambda row: row.lpips)),
    )


def _percent(part: Estimate | None, whole: Estimate | None) -> Estimate | None:
    return None if part is None or not whole.value else part.percent_of(whole)


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else round(float(estimate.value), 6)


def _with_interval(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    low, high = (None, None) if estimate is None else np.round(estimate.interval, 6).tolist()
    return {name: _value(estimate), f"{name}_low": low, f"{name}_high": high}


def level_rows(lines: Sequence[LevelLine]) -> list[dict[str, Any]]:
    """The lines of `levels.csv`."""
    return [asdict(line) for line in lines]


def left_table(lines: Sequence[LevelLine]) -> list[dict[str, Any]]:
    """`left`, a row per method and a column per level, below a row of what is recognised before."""
    return _table([line for line in lines if line.n_f], "left", lambda line: line.gone_f_before)


def lost_table(lines: Sequence[LevelLine]) -> list[dict[str, Any]]:
    """`lost`, laid out in the same way."""
    return _table(lines, "lost", lambda line: line.shown_r_before)


def _table(
    lines: Sequence[LevelLine], column: str, before: Callable[[LevelLine], float | None]
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {"": {"method": "recognised before"}}
    for line in lines:
        recognised = before(line)
        rows[""][line.level] = "" if recognised is None else f"{recognised:.0f}"
        value, low, high = (getattr(line, f"{column}{end}") for end in ("", "_low", "_high"))
        cell = "" if value is None else f"{value:.0f} [{low:.0f}, {high:.0f}]"
        rows.setdefault(line.method, {"method": line.method})[line.level] = cell
    return list(rows.values())


def moved_table(lines: Sequence[LevelLine]) -> list[dict[str, Any]]:
    """`lpips_f / lpips_r`, a row per method and a column per level."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        both = ("" if value is None else f"{value:.3f}" for value in (line.lpips_f, line.lpips_r))
        rows.setdefault(line.method, {"method": line.method})[line.level] = " / ".join(both)
    return list(rows.values())


def write_levels_plot(path: Path, lines: Sequence[LevelLine], kind: Kind) -> None:
    """Draw three panels over the levels, with a line for each method that can win."""
    from matplotlib.figure import Figure

    levels = list(dict.fromkeys(line.level for line in lines))
    methods = sorted(contenders(line.method for line in lines))
    titles = {
        "left": f"forgotten {kind.name}: still recognised, % of before",
        "lost": "others: no longer recognised, % of before",
        "lpips_r": "others: LPIPS before to after",
    }
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axis, (column, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for method in methods:
            points = {}
            for line in lines:
                value = getattr(line, column)
                if line.method == method and value is not None:
                    points[levels.index(line.level)] = value
            plot_method(axis, method, points)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(levels)), labels=levels, rotation=35, ha="right")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    write_figure(path, figure)
