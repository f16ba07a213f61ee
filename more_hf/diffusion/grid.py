"""Pictures in rows and columns, with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from PIL import Image, ImageDraw, ImageFont


GAP = 4  # pixels between pictures
LEGIBLE = 15  # size of the smallest labels; those of large pictures are larger


def draw_grid(
    rows: Mapping[str, Sequence[Image.Image | None]],
    *,
    column_labels: Sequence[str] = (),
    scale: int = 1,
    title: str = "",
) -> Image.Image:
    """
    Lay pictures out on white, with labels.

    Args:
        rows (`Mapping[str, Sequence[PIL.Image.Image | None]]`):
            The pictures of each row, by the label to its left. All get the size of the first picture; `None`
            leaves a place white.
        column_labels (`Sequence[str]`, *optional*):
            One label per column, above it; broken into lines where it is wider than its column.
        scale (`int`, *optional*, defaults to 1):
            Enlarge each picture this many times.
        title (`str`, *optional*):
            A line above everything.
    """
    first = next(picture for picture in chain(*rows.values()) if picture is not None)
    width, height = first.width * scale, first.height * scale
    size = max(LEGIBLE, width // 28)
    font, bold = ImageFont.load_default(size), ImageFont.load_default(size * 4 // 3)
    line = size + 4

    # 1. How much room the labels take.
    labels = [_wrap(label, font, width) for label in column_labels]
    left = GAP + max(int(font.getlength(label)) + 2 * GAP if label else 0 for label in rows)
    top = GAP + line * max((len(lines) for lines in labels), default=0)
    top += GAP if labels else 0
    top += bold.size + 14 if title else 0
    columns = max(len(pictures) for pictures in rows.values())
    right = max(left + columns * (width + GAP), int(bold.getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (right, top + len(rows) * (height + GAP)), "white")

    # 2. The labels: the last line of a column's label right above its pictures.
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "black", bold)
    for column, lines in enumerate(labels):
        center = left + column * (width + GAP) + width // 2
        for i, text in enumerate(reversed(lines)):
            draw.text((center, top - 2 * GAP - i * line), text, "black", font, anchor="ms")

    # 3. The pictures, and each row's label in the middle of its height.
    for row, (label, pictures) in enumerate(rows.items()):
        y = top + row * (height + GAP)
        draw.text((left - 2 * GAP, y + height // 2), label, "black", font, anchor="rm")
        for column, picture in enumerate(pictures):
            if picture is not None:
                enlarged = picture.resize((width, height), Image.Resampling.BICUBIC)
                sheet.paste(enlarged, (left + column * (width + GAP), y))
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels where its words allow."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
