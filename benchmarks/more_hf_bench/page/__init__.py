"""
The benchmarks' pages: a finding, tables, pictures and facts in one self-contained HTML file without requests.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table, number


@dataclass(frozen=True)
class Section:
    """A section of a page, in this order: note, pictures, table, facts, files. Empty parts are left out."""

    heading: str
    note: str = ""  # a paragraph below the heading
    table: Sequence[Mapping[str, object]] = ()  # as for `markdown_table`; the first row has the columns
    pictures: Mapping[str, Path | Image.Image] = field(default_factory=dict)  # by caption; a PNG or WebP file
    facts: Sequence[str] = ()  # a list of sentences
    files: Sequence[str] = ()  # next to the page with everything else, as links
    folded: bool = False  # whether only the heading shows until it is clicked


def write_report(
    folder: Path,
    *,
    title: str,
    finding: str = "",
    sections: Sequence[Section],
    made_with: Sequence[str],
    words: Mapping[str, str] | None = None,
) -> None:
    """
    Write `report.html`, and everything on it that has a table as `table.md`; both end with how it was made.
    See `write_page` for the rest; without a finding, they begin with the first section.
    """
    parts = [finding]
    for section in sections:
        if section.table:
            parts += [f"## {section.heading}", section.note, markdown_table(section.table)]
    parts.append("\n".join(f"- {fact}" for fact in made_with))
    write_text(folder / "table.md", "\n\n".join(filter(None, parts)) + "\n")
    files = ["table.md", *sorted(path.name for path in folder.glob("*.csv"))]
    how = Section("How it was made", facts=made_with, files=files, folded=True)
    write_page(folder / "report.html", title=title, finding=finding, sections=[*sections, how], words=words)


def write_page(
    path: str | Path,
    *,
    title: str,
    finding: str,
    sections: Sequence[Section],
    words: Mapping[str, str] | None = None,
) -> None:
    """
    Write a page for light and dark screens, wide and narrow, which begins with the finding, the result in
    plain words. `words` are plain words for columns, by the name without an arrow, and are written above it.
    Everything is escaped.
    """
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(columns=_columns, text=_text, uri=_uri)
    page = environment.get_template("page.html.jinja")
    write_text(path, page.render(title=title, finding=finding, sections=sections, words=words or {}) + "\n")


def _uri(picture: Path | Image.Image) -> str:
    """Encode a picture as a data URI."""
    if isinstance(picture, Path):
        kind, data = picture.suffix[1:], picture.read_bytes()
    else:
        file = io.BytesIO()
        picture.save(file, "webp", quality=90)
        kind, data = "webp", file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The columns of a table that are not empty."""
    return [name for name in rows[0] if any(row.get(name) not in (None, "") for row in rows)]


def _text(value: object) -> Markup:
    """Markdown's bold and code, in a cell of a table or a sentence."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(number(value))))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", text))
