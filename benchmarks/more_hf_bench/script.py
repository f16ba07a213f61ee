"""What the scripts beside this package share: their arguments, and the tables that they write."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table

from .columns import write_rows


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
