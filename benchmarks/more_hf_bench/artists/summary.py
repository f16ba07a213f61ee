"""From rows to `summary.csv`: one line per method and erasure, with bootstrap intervals over prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..bootstrap import ClusterBootstrap, Estimate
from ..columns import Column
from .rows import SEPARATOR, Row


POOLED = "all"  # in the column `forget`: every erasure of the method together

DISTANCES = {
    "lpips": lambda row: row.lpips,
    "lpips_64": lambda row: row.lpips_64,
    "lpips_64_rece": lambda row: row.lpips_64_rece,
}

# The columns that are compared between methods, and which way is better; the arrows of all tables come from
# here.
COLUMNS = {
    column.name: column
    for column in (
        Column("lpips_f", better="up"),
        Column("lpips_r", better="down"),
        Column("lpips_d", better="up"),
        Column("lpips_64_rece_f", better="up"),
        Column("lpips_64_rece_r", better="down"),
        Column("lpips_64_rece_d", better="up"),
        Column("lpips_r_group", better="down"),
        Column("lpips_named", better="down"),
        Column("lpips_unnamed", better="down"),
        Column("lpips_none", better="down"),
        Column("style_f", unit="%", better="down"),
        Column("style_r", unit="%", better="up"),
        Column("content_f", unit="%", better="up"),
        Column("content_r", unit="%", better="up"),
        Column("content_none", unit="%", better="up"),
    )
}

Confusion = Mapping[str, Mapping[str, float]]


class Statistics:
    """Means over rows and, with the same draws of prompts, their bootstrap distributions."""

    def __init__(self, rows: Sequence[Row]):
        self.draws = ClusterBootstrap(_prompt(row) for row in rows)

    def mean(self, rows: Sequence[Row], value: Callable[[Row], float | None]) -> Estimate | None:
        """The mean of a value over rows; `None` if it was measured on none of them."""
        return self.draws.mean((_prompt(row), value(row)) for row in rows)


def summarise(rows: Sequence[Row], *, confusion: Confusion | None = None) -> list[dict[str, Any]]:
    """
    Summarise rows: one line per method and erasure, then one per method over all its erasures of a single
    artist if it has several.

    The suffix of a column says which images it is about: `_f` the forgotten artists', `_r` all other
    artists', `_r_group` the other artists' of the same groups, `_named` those of artists that were passed to
    the method (targets, names to keep), `_unnamed` those of artists that were not, `_none` those without an
    artist. Percentages are 0 to 100. `_low` and `_high` are the 95 % bootstrap interval over prompts,
    `_change` is after minus before, prompt by prompt.

    Args:
        rows (`Sequence[Row]`):
            The rows.
        confusion (`Mapping[str, Mapping[str, float]]`, *optional*):
            {artist: {artist that the judge takes it for: percent}} on real images. It gives `style_f_real`:
            how often real images of the targets are taken for the forgotten artist, below which `style_f`
            cannot be expected to fall.
    """
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.method, row.forget), []).append(row)
    lines = [
        _line(method, forget, own[0].remap_to, own, confusion) for (method, forget), own in cells.items()
    ]
    for method in dict.fromkeys(row.method for row in rows):
        single = [row for row in rows if row.method == method and len(row.forgotten) == 1]
        if len({row.forget for row in single}) > 1:
            lines.append(_line(method, POOLED, "", single, confusion))
    return lines


def _line(
    method: str, forget: str, remap_to: str, rows: Sequence[Row], confusion: Confusion | None
) -> dict[str, Any]:
    groups = _split(rows)
    statistics = Statistics(rows)
    line: dict[str, Any] = {
        "method": method,
        "forget": forget,
        "remap_to": remap_to,
        "n_f": len(groups["f"]),
        "n_r": len(groups["r"]),
        "n_none": len(groups["none"]),
    }

    for distance, value in DISTANCES.items():
        means = {name: statistics.mean(group, value) for name, group in groups.items()}
        for name in ("f", "r"):
            line |= _with_interval(f"{distance}_{name}", means[name])
        line |= _with_interval(f"{distance}_d", _difference(means["f"], means["r"]))
        for name in ("r_group", "named", "unnamed", "none"):
            line |= _with_interval(f"{distance}_{name}", means[name])

    # A prompt without an artist asks for no style.
    for judged, value, names in (
        ("style", Row.style, ("f", "r", "unnamed")),
        ("content", Row.content, ("f", "r", "unnamed", "none")),
    ):
        for name in names:
            before, after = both_means(statistics, groups[name], value)
            line[f"{judged}_{name}_before"] = _rounded(before)
            line |= _with_interval(f"{judged}_{name}", after)
            line |= _with_interval(f"{judged}_{name}_change", _difference(after, before))

    line["style_f_real"] = _taken_for(rows, confusion)
    # Each row carries its erasure's cost, which counts once.
    line["seconds_prepare"] = _average({row.forget: row.seconds_prepare for row in rows}.values())
    line["seconds_per_image"] = _average(row.seconds for row in rows)
    line["peak_memory"] = max((row.peak_memory for row in rows if row.peak_memory is not None), default=None)
    return line


def both_means(
    statistics: Statistics, rows: Sequence[Row], value: Callable[[Row, str], float | None]
) -> tuple[Estimate | None, Estimate | None]:
    """The means of a judgement before and after."""
    before = statistics.mean(rows, lambda row: value(row, "before"))
    return before, statistics.mean(rows, lambda row: value(row, "after"))


def _split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows behind each suffix of the columns' names."""
    others = [row for row in rows if row.concept and not row.is_forgotten]
    groups: dict[str, set[str]] = {}  # erasure -> the groups of what it forgets
    for row in rows:
        if row.is_forgotten:
            groups.setdefault(row.forget, set()).add(row.group)
    return {
        "f": [row for row in rows if row.is_forgotten],
        "r": others,
        "r_group": [row for row in others if row.group in groups.get(row.forget, ())],
        "named": [row for row in others if row.is_named],
        "unnamed": [row for row in others if not row.is_named],
        "none": [row for row in rows if not row.concept],
    }


def _prompt(row: Row) -> tuple[str, int]:
    """A prompt, and the artist within which it is drawn."""
    return row.artist, row.case_number


def _with_interval(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    low, high = (None, None) if estimate is None else np.round(estimate.interval, 6).tolist()
    return {name: _rounded(estimate), f"{name}_low": low, f"{name}_high": high}


def _rounded(estimate: Estimate | None) -> float | None:
    return None if estimate is None else round(float(estimate.value), 6)


def _difference(a: Estimate | None, b: Estimate | None) -> Estimate | None:
    return None if a is None or b is None else a - b


def _taken_for(rows: Sequence[Row], confusion: Confusion | None) -> float | None:
    """
    How often the judge takes real images of the targets for the forgotten artist; `None` if there is no
    confusion for one of them.
    """
    pairs = set()
    for row in {(row.forget, row.remap_to): row for row in rows}.values():
        pairs.update(itertools.product(row.forgotten, row.remap_to.split(SEPARATOR)))
    if not confusion or any(name not in confusion for pair in pairs for name in pair):
        return None
    return _average(confusion[target].get(forget, 0.0) for forget, target in pairs)


def _average(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return round(sum(measured) / len(measured), 6) if measured else None
