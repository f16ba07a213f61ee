"""
The benchmarks' pages: tables, facts and pictures in one self-contained HTML file that makes no requests.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from more_hf.core.files import write_text
from more_hf.core.markdown import number

from ..tables import Cell


SMALL = 128  # pixels; up to this size a picture stays PNG, because JPEG would blur it


@dataclass(frozen=True)
class Pair:
    """
    One prompt before and after an edit.

    Args:
        before (`PIL.Image.Image`):
            The original model's picture.
        after (`PIL.Image.Image`):
            The edited model's picture from the same noise.
        prompt (`str`):
            The prompt of both.
        lpips (`float`):
            The distance between them.
    """

    before: Image.Image
    after: Image.Image
    prompt: str
    lpips: float


@dataclass(frozen=True)
class Section:
    """
    A section of a page, in this order: note, pictures, table, pairs, facts, files. Empty parts are left out.

    Args:
        heading (`str`):
            The heading.
        note (`str`, *optional*):
            A paragraph below the heading.
        table (`Sequence[Mapping[str, object]]`, *optional*):
            Rows as for `markdown_table`; the first row's keys are the columns.
        pictures (`Mapping[str, str]`, *optional*):
            Caption -> the picture's data URI.
        words (`Mapping[str, str]`, *optional*):
            Name of a column, without an arrow -> plain words that are written above it.
        pairs (`Sequence[Pair]`, *optional*):
            Shown as cards, with a search box. One section of a page may have them.
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
    pictures: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    pairs: Sequence[Pair] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    files: Sequence[str] = ()
    folded: bool = False


def write_page(
    path: str | Path,
    *,
    title: str,
    finding: str,
    sections: Sequence[Section],
    template: str = "report.html.jinja",
    **context: Any,
) -> None:
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
        template (`str`, *optional*, defaults to `"report.html.jinja"`):
            Another template, which extends the default one.
        context (`Any`):
            Further variables of that template.
    """
    template = _ENVIRONMENT.get_template(template)
    page = template.render(title=title, finding=finding, sections=sections, **context)
    write_text(path, page + "\n")


def image_uri(image: Image.Image) -> str:
    """Encode a picture as a data URI."""
    data = io.BytesIO()
    if max(image.size) <= SMALL:
        image.convert("RGB").save(data, "png", optimize=True)
        return _uri("png", data.getvalue())
    # At 512 pixels, PNG would make a page of hundreds of megabytes.
    image.convert("RGB").save(data, "jpeg", quality=90)
    return _uri("jpeg", data.getvalue())


def png_uri(path: Path) -> str:
    """Encode a PNG file as a data URI."""
    return _uri("png", path.read_bytes())


def _uri(kind: str, data: bytes) -> str:
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


def _columns(rows: Sequence[Mapping[str, object]]) -> list[tuple[str, str]]:
    """
    The columns of a table that are not empty, each with its class: `num` if all values are numbers.
    """
    columns = []
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        if all(value in (None, "") for value in values):
            continue
        is_numeric = all(value is None or isinstance(value, int | float | Cell) for value in values)
        columns.append((name, "num" if is_numeric else "text"))
    return columns


def _text(value: object) -> object:
    """A cell or a number as the template shows it."""
    return value if isinstance(value, Cell) else number(value)


_ENVIRONMENT = Environment(
    loader=PackageLoader(__package__, ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(columns=_columns, flat=_flat, text=_text, uri=image_uri)
