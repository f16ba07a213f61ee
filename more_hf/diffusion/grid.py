"""Pictures in rows and columns, with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from PIL import Image, ImageDraw, ImageFont


GAP = 4  # pixels between pictures
NARROW = 20  # a title is not broken into lines shorter than so many times its size
LEGIBLE = 15  # size of the smallest labels; those of large pictures are larger


def draw_grid(
    rows: Mapping[str, Sequence[Image.Image | None]],
    *,
    column_labels: Sequence[str] = (),
    scale: int = 1,
    title: str = "",
    most_columns: int | None = None,
) -> Image.Image:
    """
    Lay the pictures of each row out on white, with its label to the left.

    All get the size of the first picture, enlarged `scale` times; `None` leaves a place white. A column's
    label, and the title above everything, are broken into lines where they are wider than what is below.
    Columns beyond `most_columns` begin a new block below, without the rows that have no picture there.
    """
    columns = max(map(len, rows.values()))
    if most_columns is not None and columns > most_columns:
        blocks = []
        for start in range(0, columns, most_columns):
            part = slice(start, start + most_columns)
            shown = {label: pictures[part] for label, pictures in rows.items()}
            block = {label: some for label, some in shown.items() if any(one is not None for one in some)}
            labels, above = column_labels[part], "" if start else title
            blocks.append(draw_grid(block, column_labels=labels, scale=scale, title=above))
        return stack(blocks)
    first = next(picture for picture in chain(*rows.values()) if picture is not None)
    width, height = first.width * scale, first.height * scale
    size = max(LEGIBLE, width // 28)
    font, bold = ImageFont.load_default(size), ImageFont.load_default(size * 4 // 3)
    line = size + 4

    # 1. How much room the labels take.
    labels = [_wrap(label, font, width - GAP) for label in column_labels]
    left = GAP + max(int(font.getlength(label)) + 2 * GAP if label else 0 for label in rows)
    top = GAP + line * max((len(lines) for lines in labels), default=0)
    top += GAP if labels else 0
    right = left + columns * (width + GAP)
    titles = _wrap(title, bold, max(right - 2 * GAP, NARROW * bold.size))
    right = max([right, *(int(bold.getlength(text)) + 2 * GAP for text in titles)])
    top += len(titles) * (bold.size + 4) + (10 if titles else 0)
    sheet = Image.new("RGB", (right, top + len(rows) * (height + GAP)), "white")

    # 2. The labels: the last line of a column's label right above its pictures.
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(titles):
        draw.text((GAP, GAP + i * (bold.size + 4)), text, "black", bold)
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


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Put pictures below each other on white, aligned on the left."""
    size = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    whole = Image.new("RGB", size, "white")
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    return whole


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels, between words where they allow."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        # a word that is wider than its column is broken anywhere
        while font.getlength(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines
