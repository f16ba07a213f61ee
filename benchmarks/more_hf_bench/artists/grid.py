"""The benchmark's `grid.webp`, `methods.webp` and `words.webp`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from more_hf.diffusion.grid import draw_grid, stack

from ..figures import write_picture
from .rows import ORIGINAL, Row


# `grid.webp`: pictures in a strip, and their side in pixels
GRID_COLUMNS, GRID_SIDE = 10, 128
# `methods.webp`: pictures in a strip, their side in pixels, and the most pictures in all
METHODS_COLUMNS, METHODS_SIDE, METHODS_MOST = 8, 160, 64


def to_pil(image: Tensor) -> Image.Image:
    """Turn one uint8 image of shape `(3, H, W)` into a `PIL.Image`."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def read_image(path: Path) -> Tensor:
    """Read a picture as uint8 `(3, H, W)`."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous()


def write_grid(path: Path, images: Path, rows: Sequence[Row]) -> None:
    """Draw a block per erasure: a row before and one per method, the forgotten artists' pictures first."""
    sheets = []
    for forget, erased in _by_erasure(rows).items():
        if shown := _shown([row for row in erased if row.method == rows[0].method]):
            labels = [f"{row.thing} {row.artist}".strip() or row.prompt for row in shown]
            sheets.append(_strips(images, erased, shown, labels, f"{forget} erased"))
    _save(sheets, path)


def write_words(path: Path, images: Path, rows: Sequence[Row]) -> None:
    """
    Draw a block per erasure, a row before and one per method: the forgotten concept at each level of the
    prompts. Draw nothing if they have no levels.
    """
    sheets = []
    for forget, erased in _by_erasure(rows).items():
        shown: dict[str, Row] = {}
        for row in erased:
            if row.level and row.is_forgotten:
                shown.setdefault(row.level, row)
        if shown:
            sheets.append(_strips(images, erased, list(shown.values()), list(shown), f"{forget} erased"))
    _save(sheets, path)


def write_methods(path: Path, images: Path, rows: Sequence[Row]) -> None:
    """
    Draw one strip per erasure in the layout of the paper's Fig. 4: the original's picture of one prompt and
    every method's, and the original's picture of the target if a prompt of the target has the same thing. The
    prompt is always the file's first that names the forgotten artist. If there are many methods and erasures,
    only the first erasures are drawn.
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
        target = _target_of(first, erased)
        if target is not None:
            strip.insert(1, (f"target, {target.artist}", target.before))
        title = f"{forget} erased, target {first.remap_to}: “{first.prompt}”"
        for start in range(0, len(strip), METHODS_COLUMNS):
            labels, names = zip(*strip[start : start + METHODS_COLUMNS], strict=True)
            pictures = {"": _thumbnails(images, names, METHODS_SIDE)}
            sheets.append(draw_grid(pictures, column_labels=labels, title=title if start == 0 else ""))
    _save(sheets, path)


def _strips(
    images: Path, erased: Sequence[Row], shown: Sequence[Row], labels: Sequence[str], title: str
) -> Image.Image:
    """The pictures of some rows of an erasure: a row before and one per method."""
    after = {(row.method, row.before): row.after for row in erased}
    strips = {"before": [row.before for row in shown]}
    for method in methods_of(erased):
        strips[method] = [after.get((method, row.before)) for row in shown]
    pictures = {label: _thumbnails(images, strip, GRID_SIDE) for label, strip in strips.items()}
    return draw_grid(pictures, column_labels=labels, title=title)


def methods_of(rows: Sequence[Row]) -> list[str]:
    """The methods of the rows, in order and without the original."""
    return [method for method in dict.fromkeys(row.method for row in rows) if method != ORIGINAL]


def _target_of(row: Row, erased: Sequence[Row]) -> Row | None:
    """A row of the target with the same thing as `row`, from different noise; `None` if there is none."""
    same_thing = (other for other in erased if other.artist == row.remap_to and other.thing == row.thing)
    return next(same_thing, None) if row.thing else None


def _by_erasure(rows: Sequence[Row]) -> dict[str, list[Row]]:
    erasures: dict[str, list[Row]] = {}
    for row in rows:
        erasures.setdefault(row.forget, []).append(row)
    return erasures


def _shown(rows: Sequence[Row]) -> list[Row]:
    """The forgotten artists' first prompts, one of some others, and one without an artist."""
    own = [row for row in rows if row.is_forgotten and row.sample == 0][: GRID_COLUMNS // 2]
    others: dict[str, Row] = {}
    # Every third row, so that the things differ from one artist to the next.
    for row in [row for row in rows if not row.is_forgotten][::3]:
        others.setdefault(row.artist, row)
    without_artist = [others.pop("")] if "" in others else []
    free = GRID_COLUMNS - len(own) - len(without_artist)
    return [*own, *list(others.values())[:free], *without_artist]


def _thumbnails(images: Path, names: Sequence[str | None], side: int) -> list[Image.Image]:
    """Pictures of `side` by `side` pixels, white where one is missing."""
    thumbnails = []
    for name in names:
        picture = Image.new("RGB", (1, 1), "white") if name is None else Image.open(images / name)
        thumbnails.append(picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    return thumbnails


def _save(sheets: Sequence[Image.Image], path: Path) -> None:
    if sheets:
        write_picture(path, stack(sheets))
