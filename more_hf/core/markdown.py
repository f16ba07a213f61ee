"""Numbers and tables as a reader meets them."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence


def number(value: object) -> str:
    """Format a cell: a float with three decimals, or two significant digits where that would read 0.000."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.3f}" if value == 0 or 5e-4 <= abs(value) < 1e5 else f"{value:.1e}"


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """
    Format rows as a GitHub-flavoured Markdown table, aligned in plain text too; numbers stand to the right.

    Args:
        rows (`Sequence[Mapping[str, object]]`):
            The rows; a missing key is an empty cell.
        columns (`Sequence[str]`, *optional*):
            Which keys, in which order. Defaults to the first row's.
    """
    columns = table_columns(rows, columns)
    cells = [[_cell(number(row.get(column))) for column in columns] for row in rows]
    headers = [_cell(column) for column in columns]
    widths = [max(3, *(len(line[i]) for line in [headers, *cells])) for i in range(len(columns))]
    right = [is_numeric(rows, column) for column in columns]

    def line(texts):
        padded = (text.rjust(w) if r else text.ljust(w) for text, w, r in zip(texts, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = (f"{'-' * (w - 1)}:" if r else "-" * w for w, r in zip(widths, right, strict=True))
    return "\n".join([line(headers), f"| {' | '.join(rule)} |", *map(line, cells)])


def bare_table(rows: Iterable[tuple[str, str]]) -> str:
    """Format names and findings as a Markdown table without a heading."""
    lines = [f"| {_cell(name)} | {_cell(finding)} |" for name, finding in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def aligned_text(rows: Iterable[tuple[str, str]]) -> str:
    """Format names and findings as two columns for a terminal, as wide as it is."""
    rows = [(name.replace("`", ""), finding) for name, finding in rows]
    margin = 2 + max(len(name) for name, _ in rows)
    width = max(40, shutil.get_terminal_size((100, 24)).columns - margin)
    lines = []
    for name, finding in rows:
        first, *others = textwrap.wrap(finding, width) or [""]
        lines.append(f"{name:<{margin}}{first}")
        lines += [" " * margin + line for line in others]
    return "\n".join(lines)


def table_columns(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None) -> list[str]:
    if columns is None and not rows:
        raise ValueError("A table without rows needs `columns`.")
    return list(rows[0] if columns is None else columns)


def is_numeric(rows: Sequence[Mapping[str, object]], column: str) -> bool:
    values = [row.get(column) for row in rows if row.get(column) is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
