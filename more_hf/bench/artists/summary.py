"""From rows to numbers: one line per method and forgotten artist, with bootstrap intervals over prompts. Pure functions of the rows."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


Row = Mapping[str, Any]

ROW_TYPES: dict[str, type] = {
    "method": str,
    "forget": str,
    "remap_to": str,
    "retain": str,
    "case_number": int,
    "sample": int,
    "evaluation_seed": int,
    "artist": str,
    "thing": str,
    "group": str,
    "prompt": str,
    "lpips": float,
    "lpips_64": float,
    "lpips_64_rece": float,
    "style_before": str,
    "style_after": str,
    "content_before": int,
    "content_after": int,
    "seconds": float,
    "seconds_prepare": float,
    "peak_memory": float,
    "before": str,
    "after": str,
}
"""The columns of `rows.csv`. An empty cell of a number is `None`: nothing was measured."""

POOLED = "all"  # in the column `forget`: every erasure of the method together
SEPARATOR = "; "  # between the names in `remap_to` and `retain`
JOINT = "+"  # between artists in `forget` that are erased in one call
DRAWS = 10_000
DISTANCES = ("lpips", "lpips_64", "lpips_64_rece")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read `rows.csv`. Raises `ValueError` if a column is missing or a number is none."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [column for column in ROW_TYPES if column not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}.")
        return [{column: _value(kind, line[column]) for column, kind in ROW_TYPES.items()} for line in reader]


def _value(kind: type, text: str) -> Any:
    return text if kind is str else kind(text) if text else None


def artists_of(forget: str) -> list[str]:
    """The artists of one erasure."""
    return forget.split(JOINT)


def is_forgotten(row: Row) -> bool:
    """Whether the row's picture is of an artist that its erasure forgets."""
    return row["artist"] in artists_of(row["forget"])


class Bootstrap:
    """Draws of prompts with replacement, within each artist; every statistic of one line is taken on the same draws.

    A prompt comes with all its images (several seeds, several erasures): images of one prompt are not independent.
    """

    def __init__(self, rows: Sequence[Row], *, draws: int = DRAWS, seed: int = 0):
        generator = np.random.default_rng(seed)
        prompts = sorted({(row["artist"], row["case_number"]) for row in rows})
        self.column = {case: i for i, (_, case) in enumerate(prompts)}
        artists = [artist for artist, _ in prompts]
        times = [artists.count(artist) for artist in dict.fromkeys(artists)]
        self.times_drawn = np.concatenate([generator.multinomial(n, np.full(n, 1 / n), size=draws) for n in times], axis=1).astype(float)

    def mean(self, rows: Sequence[Row], value: Callable[[Row], float | None]) -> tuple[float, np.ndarray] | None:
        """The mean of a value over rows, and the same in every draw; `None` where there is nothing to average."""
        total, count = np.zeros(len(self.column)), np.zeros(len(self.column))
        for row in rows:
            measured = value(row)
            if measured is not None:
                total[self.column[row["case_number"]]] += measured
                count[self.column[row["case_number"]]] += 1
        if not count.any():
            return None
        drawn = self.times_drawn @ count
        with np.errstate(invalid="ignore"):
            return total.sum() / count.sum(), np.where(drawn > 0, self.times_drawn @ total / drawn, np.nan)


def summarise(rows: Sequence[Row], *, confusion: Mapping[str, Mapping[str, float]] | None = None) -> list[dict[str, Any]]:
    """One line per method and erasure, then one per method over all its erasures of a single artist where there are several.

    In every line `_f` are the forgotten artists' images, `_r` those of all other artists, `_r_group` of the other artists of their
    groups, `_named` of artists that the erasure named (targets, retain list), `_unnamed` of those it never named, `_none` those
    without an artist. Percentages are 0 to 100. `_low` and `_high` are the 95 % bootstrap interval over prompts, `_change` is after
    minus before, prompt by prompt.

    Args:
        rows: as `read_rows` gives them.
        confusion: {artist: {artist taken for: percent}} of the judge on real images. Gives `style_f_real`: how often real images of
            the targets are taken for the forgotten artist, below which `style_f` says nothing.
    """
    lines = []
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["forget"]), []).append(row)
    for (method, forget), part in cells.items():
        lines.append(_line(method, forget, part[0]["remap_to"], part, confusion))
    for method in dict.fromkeys(row["method"] for row in rows):
        single = [row for row in rows if row["method"] == method and JOINT not in row["forget"]]
        if len({row["forget"] for row in single}) > 1:
            lines.append(_line(method, POOLED, "", single, confusion))
    return lines


def _line(method: str, forget: str, remap_to: str, rows: Sequence[Row], confusion: Mapping | None) -> dict[str, Any]:
    group_of = {row["artist"]: row["group"] for row in rows}
    forgotten = [row for row in rows if is_forgotten(row)]
    others = [row for row in rows if row["artist"] and not is_forgotten(row)]
    parts = {
        "f": forgotten,
        "r": others,
        "r_group": [row for row in others if row["group"] in {group_of.get(artist) for artist in artists_of(row["forget"])}],
        "named": [row for row in others if row["artist"] in named_by(row)],
        "unnamed": [row for row in others if row["artist"] not in named_by(row)],
        "none": [row for row in rows if not row["artist"]],
    }
    draws = Bootstrap(rows)
    line: dict[str, Any] = {"method": method, "forget": forget, "remap_to": remap_to, "n_f": len(forgotten), "n_r": len(others)}
    line["n_none"] = len(parts["none"])

    def put(name: str, measured: tuple[float, np.ndarray] | None, bounds: bool = True) -> None:
        line[name] = None if measured is None else round(float(measured[0]), 6)
        if bounds:
            interval = (None, None) if measured is None else np.nanquantile(measured[1], (0.025, 0.975)).round(6).tolist()
            line[f"{name}_low"], line[f"{name}_high"] = interval

    for distance in DISTANCES:
        means = {part: draws.mean(parts[part], lambda row, d=distance: row[d]) for part in parts}
        for part in ("f", "r"):
            put(f"{distance}_{part}", means[part])
        put(f"{distance}_d", _difference(means["f"], means["r"]))
        for part in ("r_group", "named", "unnamed", "none"):
            put(f"{distance}_{part}", means[part])
    for name, judged in (("style", style_of), ("content", content_of)):
        for part in ("f", "r", "unnamed", "none"):
            if (name, part) == ("style", "none"):
                continue  # no style was asked for
            before, after = (draws.mean(parts[part], lambda row, w=when, j=judged: j(row, w)) for when in ("before", "after"))
            put(f"{name}_{part}_before", before, bounds=False)
            put(f"{name}_{part}", after)
            put(f"{name}_{part}_change", _difference(after, before))
    line["style_f_real"] = _taken_for(rows, confusion)
    line["seconds_prepare"] = _average({row["forget"]: row["seconds_prepare"] for row in rows}.values())
    line["seconds_per_image"] = _average(row["seconds"] for row in rows)
    line["peak_memory"] = max((row["peak_memory"] for row in rows if row["peak_memory"] is not None), default=None)
    return line


def named_by(row: Row) -> set[str]:
    """The artists that the row's erasure named: targets and retain list."""
    return {*row["remap_to"].split(SEPARATOR), *row["retain"].split(SEPARATOR)}


def style_of(row: Row, when: str) -> float | None:
    return 100.0 * (row[f"style_{when}"] == row["artist"]) if row[f"style_{when}"] else None


def content_of(row: Row, when: str) -> float | None:
    return None if row[f"content_{when}"] is None else 100.0 * row[f"content_{when}"]


def _difference(a: tuple[float, np.ndarray] | None, b: tuple[float, np.ndarray] | None) -> tuple[float, np.ndarray] | None:
    return None if a is None or b is None else (a[0] - b[0], a[1] - b[1])


def _taken_for(rows: Sequence[Row], confusion: Mapping[str, Mapping[str, float]] | None) -> float | None:
    """How often the judge takes real images of the targets for the forgotten artist; `None` where it never saw some of them."""
    erased = {(row["forget"], row["remap_to"]) for row in rows}
    pairs = {(artist, target) for forget, targets in erased for artist in artists_of(forget) for target in targets.split(SEPARATOR)}
    if not confusion or any(target not in confusion or forget not in confusion for forget, target in pairs):
        return None
    return _average(confusion[target].get(forget, 0.0) for forget, target in pairs)


def _average(values) -> float | None:
    measured = [value for value in values if value is not None]
    return round(sum(measured) / len(measured), 6) if measured else None
