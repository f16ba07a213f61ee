"""
The columns of the benchmarks' CSV files: their types, which way is better, and how they are read and written.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from more_hf.core.files import write_text
from more_hf.core.markdown import number


ARROWS = {"up": "↑", "down": "↓"}

# A spreadsheet treats a cell that starts like this as a formula.
FORMULA = re.compile(r"'*[=+\-@\t\r]")


@dataclass(frozen=True)
class Column:
    """
    One column of a benchmark's rows or summary.

    Args:
        name (`str`):
            The key in rows and the header in CSV files.
        type (`Callable[[str], Any]`, *optional*, defaults to `float`):
            Turns a cell into its value. An empty cell is `None`, unless the type is `str`.
        unit (`str`, *optional*):
            `"%"`, `"s"`, `"MiB"`; empty for a number without one.
        better (`"up"` or `"down"`, *optional*):
            Which way is better. `None` for a number that is only compared with a reference.
        added (`bool`, *optional*, defaults to `False`):
            Whether files of an earlier version may lack the column, whose values are then `None` (or `""`).
    """

    name: str
    type: Callable[[str], Any] = float
    unit: str = ""
    better: Literal["up", "down"] | None = None
    added: bool = False

    @property
    def header(self) -> str:
        """The name, with an arrow where one direction is better."""
        return self.name if self.better is None else f"{self.name} {ARROWS[self.better]}"

    def read(self, text: str) -> Any:
        """Return the value of a cell."""
        if self.type is str:
            return text
        return self.type(text) if text else None

    def best(self, values: Sequence[float | None]) -> float | None:
        """
        Return the best of several values; `None` if nothing was measured or neither direction is better.
        """
        measured = [value for value in values if value is not None]
        if self.better is None or not measured:
            return None
        return max(measured) if self.better == "up" else min(measured)

    def format(self, value: float | None, decimals: int = 1) -> str:
        """
        Format a number for a table: with fixed decimals if it has a unit, else with three significant ones.
        """
        if value is None:
            return ""
        return f"{value:.{decimals}f}" if self.unit else number(value)


def read_cells(path: str | Path) -> list[dict[str, str]]:
    """
    Read a CSV file that `write_rows` or `append_row` wrote, as text; an empty list if there is no such file.
    """
    if not Path(path).is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: _unescape(text) for name, text in line.items()} for line in csv.DictReader(file)]


def read_rows(path: str | Path, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """
    Read the named columns of a CSV file.

    Raises:
        ValueError: a column is missing that was not added by a later version, or a cell is not of its
        column's
            type.
    """
    lines = read_cells(path)
    missing = [c.name for c in columns if lines and c.name not in lines[0] and not c.added]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}.")
    return [{column.name: column.read(line.get(column.name, "")) for column in columns} for line in lines]


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Round floats to six decimals; NaN, which JSON does not have, becomes `None`."""

    def plain(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return None if value != value else round(value, 6)

    return {column: plain(value) for column, value in row.items()}


def write_rows(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """
    Write rows to a CSV file, atomically. The first row's keys are the columns. Text that a spreadsheet would
    treat as a formula is written with an apostrophe in front, which reading removes.

    Raises:
        ValueError: there are no rows, or a row's keys differ from the first row's.
    """
    if not rows:
        raise ValueError(f"No rows to write to {path}.")
    columns = list(rows[0])
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ValueError(f"A row for {path} has the columns {list(row)}, the first row has {columns}.")
    write_text(path, "".join(map(_line, [columns, *(row.values() for row in rows)])))


def append_row(path: str | Path, row: Mapping[str, object]) -> None:
    """
    Append one row, in the order of the columns, to a CSV file, which is created if needed. Several processes
    may append to the same file.
    """
    rows = read_cells(path)
    columns = list(rows[0] if rows else row)
    with open(path, "a", encoding="utf-8", newline="") as file:
        if file.tell() == 0:
            file.write(_line(columns))
        file.write(_line(row[column] for column in columns))


def _line(cells: Iterable[object]) -> str:
    """One line of a CSV file."""
    line = io.StringIO(newline="")
    # `csv` quotes both kinds of line break only with its default line end, which is replaced by a plain one.
    csv.writer(line).writerow(_escape(cell) if isinstance(cell, str) else cell for cell in cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _escape(text: str) -> str:
    return f"'{text}" if FORMULA.match(text) and not _is_number(text) else text


def _unescape(text: str) -> str:
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
