"""
The benchmarks' tables: numbers with intervals, the best of several methods in bold, and how they were made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from .columns import Column
from .run import BenchmarkConfig


@dataclass(frozen=True)
class Cell:
    """
    A measured number in a table: Markdown as `str`, markup in a page's template.

    Args:
        text (`str`):
            The number.
        best (`bool`, *optional*, defaults to `False`):
            Whether it is the best of several methods, and in bold.
        prefix, suffix (`str`, *optional*):
            Text before and after it, never in bold.
    """

    text: str
    best: bool = False
    prefix: str = ""
    suffix: str = ""

    def __str__(self) -> str:
        text = f"**{self.text}**" if self.best else self.text
        return f"{self.prefix}{text}{self.suffix}"

    def __html__(self) -> str:
        text = Markup("<b>{}</b>").format(self.text) if self.best else escape(self.text)
        return escape(self.prefix) + text + escape(self.suffix)


def share(percent: float) -> str:
    """A percentage in a sentence: none, all, or without decimals."""
    if percent in (0, 100):
        return "all" if percent else "none"
    if not 1 <= percent <= 99:
        return "under 1 %" if percent < 1 else "over 99 %"
    return f"{percent:.0f} %"


def compare(
    summary: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    columns: Sequence[Column],
    *,
    references: Collection[str],
    decimals: int,
    interval_decimals: int | None = None,
) -> list[dict[str, Any]]:
    """
    Lay out one row per line of a summary.

    Args:
        summary (`Sequence[Mapping[str, Any]]`):
            Lines with the keys `method` and `forget`, and a value for each label and column.
        labels (`Sequence[str]`):
            Keys whose values are shown unchanged.
        columns (`Sequence[Column]`):
            Numbers that are compared between the methods that forgot the same; the best is in bold.
        references (`Collection[str]`):
            Methods that are shown, but cannot be the best.
        decimals (`int`):
            Decimals of numbers with a unit.
        interval_decimals (`int`, *optional*):
            Decimals of the interval, which is shown only if this is given.
    """
    rivals: dict[str, list[Mapping[str, Any]]] = {}
    for line in summary:
        if line["method"] not in references:
            rivals.setdefault(line["forget"], []).append(line)
    rows = []
    for line in summary:
        row = {label: line[label] for label in labels}
        for column in columns:
            value = line[column.name]
            measured = [other[column.name] for other in rivals.get(line["forget"], ())]
            measured = [each for each in measured if each is not None]
            # A single method is not the best of several.
            best = column.best(measured) if len(measured) > 1 else None
            is_best = value is not None and value == best and line["method"] not in references
            suffix = ""
            if interval_decimals is not None and value is not None:
                low, high = line[f"{column.name}_low"], line[f"{column.name}_high"]
                suffix = f" [{low:.{interval_decimals}f}, {high:.{interval_decimals}f}]"
            row[column.header] = Cell(column.format(value, decimals), is_best, suffix=suffix)
        rows.append(row)
    return rows


def made_with(config: BenchmarkConfig, facts: Sequence[str]) -> str:
    """
    List facts about a benchmark, then the last run's machine and versions, then the commands, as Markdown.
    """
    run = config.runs[-1]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    machine = f"{run['hardware']}, {run['processes']} process(es); {versions}, more_hf {config.more_hf}"
    commands = [f"`{command}`" for command in config.commands]
    return "\n".join(f"- {fact}" for fact in (*facts, machine, *commands))
