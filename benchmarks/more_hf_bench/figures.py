"""Figures of several panels, and pictures as small files."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from more_hf.core.files import replacing


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels(
    count: int, *, width: float, height: float, legend: float = 0.0, **options: Any
) -> tuple[Figure, list[Axes]]:
    """
    Make a figure of `count` panels, with three to five in a row, whichever leaves the fewest places empty.

    Args:
        count (`int`):
            Number of panels.
        width, height (`float`):
            Size of one panel in inches.
        legend (`float`, *optional*, defaults to 0.0):
            Height of a legend below them in inches.
        options (`Any`):
            Arguments for `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    columns = count if count < 4 else min((4, 5, 3), key=lambda columns: -count % columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows + legend), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG of 256 colors: a third of the bytes, which a repository keeps forever."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    with replacing(path) as draft:
        Image.open(drawn).convert("RGB").quantize(256).save(draft, "png", optimize=True)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write pictures in rows and columns as WebP: a tenth of the bytes of a PNG, and no color is lost."""
    with replacing(path) as draft:
        picture.save(draft, "webp", quality=90, method=6)
