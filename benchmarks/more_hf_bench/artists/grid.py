"""The benchmark's pictures side by side: `grid.webp`, `methods.webp` and `words.webp`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from more_hf.diffusion.grid import draw_grid, stack

from ..figures import write_picture
from .rows import ORIGINAL


COLUMNS = 10  # pictures in a strip
SIDE = 128  # of a picture, in pixels
METHODS_MOST = 64  # pictures in `methods.webp`


def to_pil(image: Tensor) -> Image.Image:
    """Turn one uint8 image of shape `(3, H, W)` into a `PIL.Image`."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def read_image(path: Path) -> Tensor:
    """Read a picture as uint8 `(3, H, W)`."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous()


def write_grids(output: Path, images: Path, rows: pd.DataFrame) -> None:
    """
    Draw a block per erasure, with a row before and one per method. `grid.webp` has the forgotten artists'
    pictures first, `words.webp` the forgotten concept at each level of the prompts, if they have levels, and
    `methods.webp` in the layout of the paper's Fig. 4 one prompt by every method, for the first erasures.
    """
    methods = [method for method in rows["method"].unique() if method != ORIGINAL]
    erasures = dict(list(rows.groupby("forget", sort=False)))
    grids: dict[str, list[Image.Image]] = {"grid": [], "words": [], "methods": []}
    for forget, erased in erasures.items():
        first = erased[erased["method"] == rows["method"].iloc[0]]
        levels = first[first["is_forgotten"] & (first["level"] != "")].drop_duplicates("level")
        shown = _shown(first)
        labels = (shown["thing"] + " " + shown["artist"]).str.strip()
        labels = labels.where(labels != "", shown["prompt"]).tolist()
        title = f"{forget} erased"
        if len(shown):
            grids["grid"].append(_block(images, erased, shown, methods, labels, title))
        if len(levels):
            grids["words"].append(_block(images, erased, levels, methods, levels["level"].tolist(), title))
        if len(grids["methods"]) < max(1, METHODS_MOST // (1 + len(methods))):
            grids["methods"] += _strip(images, erased, methods)
    for name, sheets in grids.items():
        if sheets:
            write_picture(output / f"{name}.webp", stack(sheets))


def _block(
    images: Path,
    erased: pd.DataFrame,
    shown: pd.DataFrame,
    methods: Sequence[str],
    labels: Sequence[str],
    title: str,
) -> Image.Image:
    """The pictures of some prompts of an erasure: a row before and one per method."""
    after = dict(zip(zip(erased["method"], erased["before"], strict=True), erased["after"], strict=True))
    strips = {"before": [_thumbnail(images, name) for name in shown["before"]]}
    for method in methods:
        strips[method] = [_thumbnail(images, after.get((method, name))) for name in shown["before"]]
    return draw_grid(strips, column_labels=labels, title=title)


def _strip(images: Path, erased: pd.DataFrame, methods: Sequence[str]) -> list[Image.Image]:
    """
    The original's picture of the erasure's first prompt that names what is forgotten, the original's of the
    target if a prompt of the target has the same thing, and every method's.
    """
    forgotten = erased[erased["is_forgotten"]]
    if forgotten.empty:
        return []
    first = forgotten.iloc[0]
    own = erased[erased["before"] == first["before"]].set_index("method")["after"]
    strip = {"original": first["before"]}
    target = erased[(erased["artist"] == first["remap_to"]) & (erased["thing"] == first["thing"])]
    if first["thing"] and len(target):
        strip[f"target, {first['remap_to']}"] = target["before"].iloc[0]
    strip |= {method: own.get(method) for method in methods}
    title = f"{first['forget']} erased, target {first['remap_to']}: “{first['prompt']}”"
    sheets = []
    for start in range(0, len(strip), COLUMNS):
        labels = list(strip)[start : start + COLUMNS]
        pictures = {"": [_thumbnail(images, strip[label]) for label in labels]}
        sheets.append(draw_grid(pictures, column_labels=labels, title="" if start else title))
    return sheets


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    """The forgotten artists' first prompts, one of some others, and one without an artist."""
    own = rows[rows["is_forgotten"] & (rows["sample"] == 0)].head(COLUMNS // 2)
    # Every third row, so that the things differ from one artist to the next.
    others = rows[~rows["is_forgotten"]].iloc[::3].drop_duplicates("artist")
    without_artist = others[others["artist"] == ""]
    free = COLUMNS - len(own) - len(without_artist)
    return pd.concat([own, others[others["artist"] != ""].head(free), without_artist])


def _thumbnail(images: Path, name: str | None) -> Image.Image:
    """A picture, white where there is none."""
    picture = Image.new("RGB", (1, 1), "white") if name is None else Image.open(images / name)
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
