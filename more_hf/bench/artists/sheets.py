"""The benchmark's pictures for a README: `grid.png`, many prompts before and after, and `methods.png`, one prompt and every method."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .images import grid, stack
from .store import ORIGINAL, read_image
from .summary import is_forgotten


WIDTH, SIDE = 10, 128  # of `grid.png`: pictures in a strip, pixels of one
METHODS_WIDTH, METHODS_SIDE, METHODS_MOST = 8, 160, 64  # of `methods.png`: pictures in a strip, pixels of one, pictures in all


def write_grid(path: Path, images: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One strip per erasure: before above every method, the forgotten artists' pictures first, then the others'."""
    sheets = []
    methods = _methods(rows)
    for forget, erased in _by_erasure(rows).items():
        after = {(row["method"], row["before"]): row["after"] for row in erased}
        shown = _shown([row for row in erased if row["method"] == rows[0]["method"]])
        if not shown:
            continue
        paths = [row["before"] for row in shown] + [after.get((method, row["before"])) for method in methods for row in shown]
        sheets.append(
            grid(
                torch.stack([_thumbnail(images, path, SIDE) for path in paths]),
                columns=len(shown),
                row_labels=["before", *methods],
                column_labels=[f"{row['thing']} {row['artist']}".strip() or row["prompt"] for row in shown],
                title=f"{forget} erased",
            )
        )
    if sheets:
        _save(stack(sheets), path)


def write_methods(path: Path, images: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """For every erasure one prompt that names the forgotten artist: the original's picture and every method's, side by side.

    It is the first such prompt of the file, whatever came out; in the layout of the paper's Fig. 4. Where many methods meet many
    erasures, only the first erasures are drawn.
    """
    sheets = []
    for forget, erased in list(_by_erasure(rows).items())[: max(1, METHODS_MOST // (1 + len(_methods(rows))))]:
        first = next((row for row in erased if is_forgotten(row)), None)
        if first is None:
            continue
        after = {row["method"]: row["after"] for row in erased if row["before"] == first["before"]}
        strip = [("original", first["before"]), *((method, after.get(method)) for method in _methods(rows))]
        for start in range(0, len(strip), METHODS_WIDTH):
            part = strip[start : start + METHODS_WIDTH]
            sheets.append(
                grid(
                    torch.stack([_thumbnail(images, name, METHODS_SIDE) for _, name in part]),
                    columns=len(part),
                    column_labels=[method for method, _ in part],
                    title=f"{forget} erased: \u201c{first['prompt']}\u201d" if start == 0 else "",
                )
            )
    if sheets:
        _save(stack(sheets), path)


def _methods(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [method for method in dict.fromkeys(row["method"] for row in rows) if method != ORIGINAL]


def _by_erasure(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    erasures: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        erasures.setdefault(row["forget"], []).append(row)
    return erasures


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The forgotten artists' first prompts, one of some others, one without an artist."""
    own = [row for row in rows if is_forgotten(row) and row["sample"] == 0][: WIDTH // 2]
    first: dict[str, Mapping[str, Any]] = {}
    for i, row in enumerate(row for row in rows if not is_forgotten(row)):
        first.setdefault(row["artist"], row) if i % 3 == 0 else None
    none = [first.pop("")] if "" in first else []
    return [*own, *list(first.values())[: WIDTH - len(own) - len(none)], *none]


def _thumbnail(images: Path, name: str | None, side: int) -> Tensor:
    """uint8 `(3, side, side)`; white where there is no picture yet."""
    if name is None:
        return torch.full((3, side, side), 255, dtype=torch.uint8)
    image = read_image(images / name)[None].float()
    return interpolate(image, (side, side), mode="bilinear", antialias=True)[0].round().clamp(0, 255).byte()


def _save(sheet: Image.Image, path: Path) -> None:
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part")
    sheet.save(beside, "png")
    beside.replace(path)
