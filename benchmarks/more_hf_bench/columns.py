"""The columns of the benchmarks' CSV files: which way is better, and how they are read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from more_hf.core.files import write_text
from more_hf.core.markdown import number


ARROWS = {"up": "↑", "down": "↓"}

# These columns are text, even where all values of a file look like numbers, such as the names of digits.
TEXT = (
    *("method", "forget", "remap_to", "retain", "sent_to", "learning_rate"),
    *("artist", "thing", "group", "prompt", "level", "style_before", "style_after", "before", "after"),
    *("attack", "model", "measure", "variant", "unit"),
)


@dataclass(frozen=True)
class Column:
    """A column of numbers in a table."""

    name: str  # the key in rows and the header in CSV files
    unit: str = ""  # `"%"`, `"s"`, `"MiB"`; empty for a number without one
    # Which way is better. `None` for a number that is only compared with a reference.
    better: Literal["up", "down"] | None = None

    @property
    def header(self) -> str:
        """The name, with an arrow where one direction is better."""
        return self.name if self.better is None else f"{self.name} {ARROWS[self.better]}"

    def format(self, value: float | None, decimals: int = 1) -> str:
        """
        Format a number for a table: with fixed decimals if it has a unit, else with three significant ones.
        """
        if pd.isna(value):
            return ""
        return f"{value:.{decimals}f}" if self.unit else number(value)


def read_rows(path: str | Path) -> pd.DataFrame:
    """Read a CSV file. An empty cell is `""` in a column of `TEXT`, else NaN."""
    rows = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=[""])
    texts = rows.columns.intersection(TEXT)
    rows[texts] = rows[texts].fillna("")
    return rows


def read_cells(path: str | Path) -> list[dict[str, str]]:
    """Read a CSV file as text; an empty list if there is no such file."""
    if not Path(path).is_file():
        return []
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def write_rows(path: str | Path, rows: pd.DataFrame | Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file, atomically. `None` and NaN are empty cells."""
    # As objects, whole numbers stay whole beside an empty cell.
    write_text(path, pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n"))


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append a row to a CSV file, in the order of its columns; the file is created if needed."""
    is_new = not Path(path).is_file()
    columns = list(row) if is_new else list(pd.read_csv(path, nrows=0))
    table = pd.DataFrame([row], dtype=object)[columns]
    text = table.to_csv(index=False, header=is_new, lineterminator="\n")
    with open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Round floats to six decimals; NaN, which JSON does not have, becomes `None`."""
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, float)}
    return {**row, **{name: None if pd.isna(value) else round(value, 6) for name, value in numbers.items()}}
