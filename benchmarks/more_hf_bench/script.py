"""What the scripts beside this package share: their arguments, the tables that they write, and a grid search:
every point is measured once and kept as a line of a CSV file; the best line is chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table

from .columns import append_row, read_cells, write_rows


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a script, line by line."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def write_table(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    *,
    above: str = "",
    below: str = "",
) -> None:
    """Write rows to PATH.csv, and as a table between two texts to PATH.md; print the table."""
    write_rows(path.with_suffix(".csv"), rows)
    table = markdown_table(rows, columns)
    write_text(path.with_suffix(".md"), "\n\n".join(filter(None, (above, table, below))) + "\n")
    print(table)


Point = Mapping[str, Any]


def grid(**values: Any) -> list[dict[str, Any]]:
    """Every combination of the values; one that is not a list is the same in all."""
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*lists)]


def points_of(grids: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Point]:
    """The points of several methods' grids: method and settings."""
    return [{"method": method, "settings": settings} for method, cells in grids.items() for settings in cells]


def search(
    path: Path, points: Sequence[Point], measure: Callable[[Sequence[Point]], Iterable[Mapping[str, Any]]]
) -> list[dict[str, str]]:
    """
    Measure the points that have no line in a CSV file yet, and return all its lines. A stopped search goes on
    after its last line.

    A line has the point's keys, which tell it apart (settings as JSON), then what was measured. `measure`
    takes the points that are missing, and yields a line for each, in their order.
    """
    keys = [{name: _text(value) for name, value in point.items()} for point in points]
    done = [{name: line[name] for name in keys[0]} for line in read_cells(path)]
    missing = [i for i, key in enumerate(keys) if key not in done]
    if missing:
        for i, line in zip(missing, measure([points[i] for i in missing]), strict=True):
            append_row(path, {**keys[i], **line})
    return read_cells(path)


def best_settings(
    lines: Sequence[Mapping[str, str]], grids: Mapping[str, Sequence[Mapping[str, Any]]], score: str
) -> dict[str, dict[str, Any]]:
    """The settings with the largest score, the first of equals; of methods whose grid is measured whole."""
    best = {}
    for method, cells in grids.items():
        own = [line for line in lines if line["method"] == method and json.loads(line["settings"]) in cells]
        if len(own) == len(cells) > 1:
            best[method] = json.loads(max(own, key=lambda line: float(line[score]))["settings"])
    return best


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
