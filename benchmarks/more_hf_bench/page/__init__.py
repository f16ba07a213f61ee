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
from more_hf.core.markdown import number


@dataclass(frozen=True)
class Section:
    """
    A section of a page, in this order: note, pictures, table, facts, files. Empty parts are left out.

    Args:
        heading (`str`):
            The heading.
        note (`str`, *optional*):
            A paragraph below the heading.
        table (`Sequence[Mapping[str, object]]`, *optional*):
            Rows as for `markdown_table`; the first row's keys are the columns.
        pictures (`Mapping[str, Path or Image.Image]`, *optional*):
            Caption -> the picture, or its PNG or WebP file.
        words (`Mapping[str, str]`, *optional*):
            Name of a column, without an arrow -> plain words that are written above it.
        facts (`Mapping[str, object]`, *optional*):
            Names and values; lists are joined with commas, nested mappings flattened.
        files (`Sequence[str]`, *optional*):
            Files next to the page with everything else, as links.
        folded (`bool`, *optional*, defaults to `False`):
            Whether only the heading shows until it is clicked.
    """

    heading: str
    note: str = ""
    table: Sequence[Mapping[str, object]] = ()
    pictures: Mapping[str, Path | Image.Image] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    files: Sequence[str] = ()
    folded: bool = False


def write_page(path: str | Path, *, title: str, finding: str, sections: Sequence[Section]) -> None:
    """
    Write a page for light and dark screens, wide and narrow. Everything is escaped.

    Args:
        path (`str` or `Path`):
            The file to write.
        title (`str`):
            Title and heading.
        finding (`str`):
            The result in plain words. The page begins with it.
        sections (`Sequence[Section]`):
            The page's body.
    """
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(columns=_columns, flat=_flat, text=_text, uri=_uri)
    page = environment.get_template("page.html.jinja")
    write_text(path, page.render(title=title, finding=finding, sections=sections) + "\n")


def _uri(picture: Path | Image.Image) -> str:
    """Encode a picture as a data URI."""
    if isinstance(picture, Path):
        kind, data = picture.suffix[1:], picture.read_bytes()
    else:
        file = io.BytesIO()
        picture.save(file, "webp", quality=90)
        kind, data = "webp", file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _flat(facts: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Names and texts of facts; the names of a nested mapping follow its own."""
    items = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            items += _flat(value, f"{prefix}{name} · ")
            continue
        values = value if isinstance(value, list | tuple) else [value]
        texts = ["none" if each is None else number(each) for each in values]
        items.append((f"{prefix}{name}", ", ".join(texts) or "none"))
    return items


def _columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The columns of a table that are not empty."""
    return [name for name in rows[0] if any(row.get(name) not in (None, "") for row in rows)]


def _text(value: object) -> Markup:
    """A cell of a Markdown table."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(number(value)))))
