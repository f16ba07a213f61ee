"""Format numbers and tables for readers."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence


def number(value: object) -> str:
    """Format a cell: a float with three decimals, or two significant digits where that would read 0.000."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if value == 0 or 5e-4 <= abs(value) < 1e5 else f"{value:.1e}"


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """
    Format rows as a GitHub-flavored Markdown table, aligned in plain text too, with numbers on the right. The
    columns are by default the keys of the first row; a missing key gives an empty cell.

    Raises:
        `ValueError`: there are neither rows nor columns.
    """
    if columns is None and not rows:
        raise ValueError("A table without rows needs column names. Pass `columns`.")
    texts = []
    for column in rows[0] if columns is None else columns:
        cells = [_cell(number(row.get(column))) for row in rows]
        texts.append(_aligned(_cell(column), cells, right=_is_numeric(rows, column)))
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*texts, strict=True))


def _aligned(header: str, cells: Sequence[str], *, right: bool) -> list[str]:
    """A column's lines, padded to the same width: header, rule, cells."""
    width = max(3, *map(len, [header, *cells]))
    if right:
        return [header.rjust(width), "-" * (width - 1) + ":", *(cell.rjust(width) for cell in cells)]
    return [header.ljust(width), "-" * width, *(cell.ljust(width) for cell in cells)]


def bare_table(rows: Iterable[tuple[str, str]]) -> str:
    """Format names and findings as a Markdown table without a heading."""
    lines = [f"| {_cell(name)} | {_cell(finding)} |" for name, finding in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def aligned_text(rows: Iterable[tuple[str, str]]) -> str:
    """Format names and findings as two columns that fill the terminal's width."""
    rows = [(name.replace("`", ""), finding) for name, finding in rows]
    margin = 2 + max(len(name) for name, _ in rows)
    width = max(40, shutil.get_terminal_size((100, 24)).columns - margin)
    lines = []
    for name, finding in rows:
        first, *others = textwrap.wrap(finding, width) or [""]
        lines.append(f"{name:<{margin}}{first}")
        lines += [" " * margin + line for line in others]
    return "\n".join(lines)


def _is_numeric(rows: Sequence[Mapping[str, object]], column: str) -> bool:
    """Whether the column has values, and all of them are numbers."""
    values = [row[column] for row in rows if row.get(column) is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)


def _cell(text: str) -> str:
    """Escape text so that it stays within its cell."""
    return text.replace("|", "\\|").replace("\n", " ")
