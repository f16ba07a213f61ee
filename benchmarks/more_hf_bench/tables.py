"""
The benchmarks' tables: numbers with intervals, the best of several methods in bold, and how they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .columns import Column, read_rows, write_rows
from .errors import BenchmarkError
from .run import BenchmarkConfig


POOLED = "all"  # in a summary, the `forget` or `model` of lines over everything


def measured_rows(
    folder: Path, results: str, collect: Callable[[], Mapping[str, Sequence[Mapping[str, Any]]]]
) -> pd.DataFrame:
    """
    Read rows.csv of a benchmark's folder. If that has its folder of `results`, finished or not, the file is
    first written of what `collect` gives: name of a CSV file -> its rows.

    Raises:
        BenchmarkError: no result is complete, or the folder has neither results nor rows.
    """
    if (folder / results).is_dir():
        collected = collect()
        if not collected["rows"]:
            raise BenchmarkError(
                f"{folder} has no completed result yet. Run the same `more-hf bench` command again."
            )
        for name, rows in collected.items():
            write_rows(folder / f"{name}.csv", rows)
    if not (folder / "rows.csv").is_file():
        raise BenchmarkError(
            f"{folder} has neither {results} nor rows.csv, so there is nothing to make tables from. Run the "
            "same `more-hf bench` command again."
        )
    return read_rows(folder / "rows.csv")


def share(percent: float) -> str:
    """A percentage in a sentence: none, all, or without decimals."""
    if percent in (0, 100):
        return "all" if percent else "none"
    if not 1 <= percent <= 99:
        return "under 1 %" if percent < 1 else "over 99 %"
    return f"{percent:.0f} %"


def with_interval(line: Mapping[str, Any], name: str, form: str, form_of_ends: str | None = None) -> str:
    """A number of a summary's line with its interval, as text; empty if it was not measured."""
    if pd.isna(line[name]):
        return ""
    value, low, high = (line[f"{name}{end}"] for end in ("", "_low", "_high"))
    ends = form_of_ends or form
    return f"{value:{form}} [{low:{ends}}, {high:{ends}}]"


def compare(
    summary: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    columns: Sequence[Column],
    *,
    references: Collection[str],
    decimals: int,
    interval_decimals: int | None = None,
    before: Collection[str] = (),
) -> list[dict[str, Any]]:
    """
    Lay out one row per line of a summary, which has the keys `method` and `forget`, and a value for each
    label and column.

    The `labels` are shown unchanged. The `columns` are numbers that are compared between the methods that
    forgot the same; the best of several is in bold, but for the `references`. Columns that the summary lacks
    are left out; those in `before` show the number before the erasure, too. The interval is shown only with
    `interval_decimals`.
    """
    lines = pd.DataFrame(summary)
    rivals = ~lines["method"].isin(references)
    rows = [{label: line[label] for label in labels} for line in summary]
    for column in columns:
        if column.name not in lines:
            continue
        # Only methods that forgot the same are compared, and a single one is not the best.
        groups = lines[column.name].astype(float).where(rivals).groupby(lines["forget"])
        best = groups.transform("max" if column.better == "up" else "min").where(
            (groups.transform("count") > 1) & rivals & (column.better is not None)
        )
        for row, line, best_value in zip(rows, summary, best, strict=True):
            value = line[column.name]
            text = column.format(value, decimals)
            if value == best_value:
                text = f"**{text}**"
            if column.name in before and not pd.isna(line[f"{column.name}_before"]):
                text = f"{column.format(line[f'{column.name}_before'], decimals)} → {text}"
            if interval_decimals is not None and not pd.isna(value):
                low, high = line[f"{column.name}_low"], line[f"{column.name}_high"]
                text += f" [{low:.{interval_decimals}f}, {high:.{interval_decimals}f}]"
            row[column.header] = text
    return rows


def pivot(cells: pd.DataFrame, index: list[str], columns: str) -> list[dict[str, Any]]:
    """Lay out the column `cell`: rows and columns in the order of the lines, empty where there is none."""
    empty = dict.fromkeys(cells[columns], "")
    rows: dict[tuple, dict[str, Any]] = {}
    for key, name, text in zip(
        cells[index].itertuples(index=False), cells[columns], cells["cell"], strict=True
    ):
        rows.setdefault(key, {**dict(zip(index, key, strict=True)), **empty})[name] = text
    return list(rows.values())


def made_with(config: BenchmarkConfig, facts: Sequence[str]) -> list[str]:
    """List facts about a benchmark, then the last run's machine and versions, then the commands."""
    run = config.runs[-1]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    machine = f"{run['hardware']}, {run['processes']} process(es); {versions}, more_hf {config.more_hf}"
    return [*facts, machine, *(f"`{command}`" for command in config.commands)]
