"""What asking in other words still gets: every method at every level of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bootstrap import Estimate
from ..figures import write_figure
from .kinds import Kind
from .ranking import contenders
from .rows import Row
from .summary import Statistics, both_means


@dataclass(frozen=True)
class LevelLine:
    """
    One method at one level, over all erasures, on the pictures that every method has: a line of `levels.csv`.

    Attributes:
        gone_f_before, gone_f (`float`, *optional*):
            Percent of the forgotten pictures in which their artist (or thing) is recognised; `None` if the
            level has none of them.
        left (`float`, *optional*):
            `gone_f` in percent of `gone_f_before`; `None` if the original shows nothing of it either.
        shown_r_before, shown_r (`float`, *optional*):
            Percent of the other pictures in which their artist (or thing) is recognised; where the level
            names none, what else it asks for.
        lost (`float`, *optional*):
            What is missing of `shown_r_before`, in percent of it.
        lpips_f, lpips_r (`float`, *optional*):
            How far the pictures of both moved.
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
    The lines of every level, in the order of the prompts; empty if the prompts have no levels, or if there is
    no picture yet that every method has.
    """
    levels = list(dict.fromkeys(row.level for row in sorted(rows, key=lambda row: row.case_number)))
    methods = list(dict.fromkeys(row.method for row in rows))
    common = set.intersection(*({row.case for row in rows if row.method == method} for method in methods))
    shared = [row for row in rows if row.case in common]
    if levels == [""] or not shared:
        return []
    statistics = Statistics(shared)
    lines = []
    for level in levels:
        here = [row for row in shared if row.level == level]
        for method in methods if here else ():
            lines.append(_line(level, method, [row for row in here if row.method == method], statistics))
    return lines


def _line(level: str, method: str, rows: Sequence[Row], statistics: Statistics) -> LevelLine:
    forgotten = [row for row in rows if row.is_forgotten]
    others = [row for row in rows if not row.is_forgotten]
    kind = rows[0].kind
    # A prompt without an artist asks for no style: there it counts whether the thing is still drawn.
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
    """A row per method, a column per level: `left`; above them the percentage that is recognised before."""
    return _table([line for line in lines if line.n_f], "left", lambda line: line.gone_f_before)


def lost_table(lines: Sequence[LevelLine]) -> list[dict[str, Any]]:
    """The same of the others: `lost`."""
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
    """A row per method, a column per level: `lpips_f / lpips_r`."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        both = ("" if value is None else f"{value:.3f}" for value in (line.lpips_f, line.lpips_r))
        rows.setdefault(line.method, {"method": line.method})[line.level] = " / ".join(both)
    return list(rows.values())


def write_levels_plot(path: Path, lines: Sequence[LevelLine], kind: Kind) -> None:
    """Draw three panels, a line per method that can win over the levels."""
    from matplotlib.figure import Figure

    levels = list(dict.fromkeys(line.level for line in lines))
    shown = (
        ("left", f"forgotten {kind.name}: still recognised, % of before"),
        ("lost", "others: no longer recognised, % of before"),
        ("lpips_r", "others: LPIPS before to after"),
    )
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axis, (column, title) in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for method in sorted(contenders(line.method for line in lines)):
            own = [line for line in lines if line.method == method and getattr(line, column) is not None]
            places = [levels.index(line.level) for line in own]
            values = [getattr(line, column) for line in own]
            width = 2.5 if method.startswith("more") else 1.2
            axis.plot(places, values, marker="o", markersize=4, linewidth=width, label=method)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(levels)), labels=levels, rotation=35, ha="right")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    write_figure(path, figure)
