"""Rows and columns of the benchmarks' CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.files import write_text


def write_rows(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """
    Write rows to a CSV file, whole or not at all. The first row's keys are the columns.

    Raises:
        ValueError: if there are no rows, or a row has other keys than the first.
    """
    if not rows:
        raise ValueError(f"No rows to write to {path}.")
    columns = list(rows[0])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ValueError(f"A row for {path} has the columns {list(row)}, the first row has {columns}.")
        writer.writerow(row)
    write_text(path, text.getvalue())
