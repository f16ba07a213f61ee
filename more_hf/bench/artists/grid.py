"""Pictures side by side: grids with labels, and the benchmark's `grid.png` and `methods.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from ...core.files import replacing
from .rows import ORIGINAL, Row


# of `grid.png`: pictures in a strip, pixels of one
GRID_COLUMNS, GRID_SIDE = 10, 128
# of `methods.png`: pictures in a strip, pixels of one, pictures in all
METHODS_COLUMNS, METHODS_SIDE, METHODS_MOST = 8, 160, 64


def to_pil(image: Tensor) -> Image.Image:
    """Turn one uint8 image of shape `(3, H, W)` into a `PIL.Image`."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def read_image(path: Path) -> Tensor:
    """Read a picture as uint8 `(3, H, W)`."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous()


def grid(
    images: Tensor,
    *,
    columns: int,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: int = 1,
    title: str = "",
) -> Image.Image:
    """
    Lay images out row by row on white, with labels.

    Args:
        images (`torch.Tensor`):
            uint8 of shape `(n, 3, H, W)`; the last row may be short.
        columns (`int`):
            Images per row.
        row_labels (`Sequence[str]`, *optional*):
            One label per row, to its left.
        column_labels (`Sequence[str]`, *optional*):
            One label per column, above it; broken into lines where it is wider than its column.
        scale (`int`, *optional*, defaults to 1):
            Enlarge each image this many times.
        title (`str`, *optional*):
            A line above everything.
    """
    font, bold = ImageFont.load_default(size=15), ImageFont.load_default(size=20)
    height, width = (side * scale for side in images.shape[-2:])
    gap, line = 4, 19
    labels = [_wrap(label, font, width) for label in column_labels[:columns]]
    left = gap + max((int(font.getlength(label)) + 2 * gap for label in row_labels), default=0)
    top = (
        gap
        + (34 if title else 0)
        + line * max((len(lines) for lines in labels), default=0)
        + (gap if labels else 0)
    )
    rows = -(-len(images) // columns)
    right = left + columns * (width + gap)
    if title:
        right = max(right, int(bold.getlength(title)) + 2 * gap)

    sheet = Image.new("RGB", (right, top + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), title, fill="black", font=bold)
    for column, lines in enumerate(labels):
        centre = left + column * (width + gap) + width // 2
        for i, text in enumerate(reversed(lines)):
            draw.text((centre, top - 2 * gap - i * line), text, fill="black", font=font, anchor="ms")
    for row, label in enumerate(row_labels[:rows]):
        draw.text(
            (left - 2 * gap, top + row * (height + gap) + height // 2), label, "black", font, anchor="rm"
        )
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        picture = to_pil(image).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + column * (width + gap), top + row * (height + gap)))
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Put pictures below each other on white, aligned on the left."""
    whole = Image.new(
        "RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white"
    )
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    return whole


def write_grid(path: Path, images: Path, rows: Sequence[Row]) -> None:
    """Draw one strip per erasure: before above every method, the forgotten artists' pictures first."""
    sheets = []
    methods = methods_of(rows)
    for forget, erased in _by_erasure(rows).items():
        shown = _shown([row for row in erased if row.method == rows[0].method])
        if not shown:
            continue
        after = {(row.method, row.before): row.after for row in erased}
        paths = [row.before for row in shown]
        for method in methods:
            paths += [after.get((method, row.before)) for row in shown]
        sheets.append(
            grid(
                torch.stack([_thumbnail(images, path, GRID_SIDE) for path in paths]),
                columns=len(shown),
                row_labels=["before", *methods],
                column_labels=[f"{row.thing} {row.artist}".strip() or row.prompt for row in shown],
                title=f"{forget} erased",
            )
        )
    _save(sheets, path)


def write_methods(path: Path, images: Path, rows: Sequence[Row]) -> None:
    """
    Draw one strip per erasure: the original's picture and every method's of one prompt, in the layout of the
    paper's Fig. 4. The prompt is the first of the file that names the forgotten artist, whatever came out. If
    many methods meet many erasures, only the first erasures are drawn.
    """
    sheets = []
    methods = methods_of(rows)
    most = max(1, METHODS_MOST // (1 + len(methods)))
    for forget, erased in list(_by_erasure(rows).items())[:most]:
        first = next((row for row in erased if row.is_forgotten), None)
        if first is None:
            continue
        after = {row.method: row.after for row in erased if row.before == first.before}
        strip = [("original", first.before), *((method, after.get(method)) for method in methods)]
        for start in range(0, len(strip), METHODS_COLUMNS):
            part = strip[start : start + METHODS_COLUMNS]
            sheets.append(
                grid(
                    torch.stack([_thumbnail(images, name, METHODS_SIDE) for _, name in part]),
                    columns=len(part),
                    column_labels=[method for method, _ in part],
                    title=f"{forget} erased: “{first.prompt}”" if start == 0 else "",
                )
            )
    _save(sheets, path)


def methods_of(rows: Sequence[Row]) -> list[str]:
    """The methods of rows without the original, in their order."""
    return [method for method in dict.fromkeys(row.method for row in rows) if method != ORIGINAL]


def _by_erasure(rows: Sequence[Row]) -> dict[str, list[Row]]:
    erasures: dict[str, list[Row]] = {}
    for row in rows:
        erasures.setdefault(row.forget, []).append(row)
    return erasures


def _shown(rows: Sequence[Row]) -> list[Row]:
    """The forgotten artists' first prompts, one of some others, and one without an artist."""
    own = [row for row in rows if row.is_forgotten and row.sample == 0][: GRID_COLUMNS // 2]
    others: dict[str, Row] = {}
    # Every third row: the things differ from one artist to the next.
    for row in [row for row in rows if not row.is_forgotten][::3]:
        others.setdefault(row.artist, row)
    without_artist = [others.pop("")] if "" in others else []
    free = GRID_COLUMNS - len(own) - len(without_artist)
    return [*own, *list(others.values())[:free], *without_artist]


def _thumbnail(images: Path, name: str | None, side: int) -> Tensor:
    """uint8 `(3, side, side)`; white where there is no picture yet."""
    if name is None:
        return torch.full((3, side, side), 255, dtype=torch.uint8)
    image = read_image(images / name)[None].float()
    return interpolate(image, (side, side), mode="bilinear", antialias=True)[0].round().clamp(0, 255).byte()


def _save(sheets: Sequence[Image.Image], path: Path) -> None:
    if sheets:
        with replacing(path) as draft:
            stack(sheets).save(draft, "png")


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels where its words allow."""
    lines = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
