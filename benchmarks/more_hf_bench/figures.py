"""Figures of several panels, and pictures as small files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
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
    `width` and `height` are those of one panel, `legend` the height of a legend below them, in inches;
    `options` are of `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    columns = count if count < 4 else min((4, 5, 3), key=lambda columns: -count % columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows + legend), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def legend_below(figure: Figure) -> None:
    """Put one legend for all panels below them."""
    drawn = {}
    for axis in figure.axes:
        handles, names = axis.get_legend_handles_labels()
        drawn |= dict(zip(names, handles, strict=True))
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=min(6, len(drawn)), fontsize=9)


def write_lines(
    path: Path, lines: Sequence[Mapping[str, Any]], x: str, methods: Sequence[str], titles: Mapping[str, str]
) -> None:
    """
    Draw a panel for each column of a table's lines, over the values of `x`, with a line for each method, ours
    thicker; dotted: before the erasure.
    """
    figure, axes = panels(len(titles), width=5, height=4, legend=0.6)
    table = pd.DataFrame(lines)
    table["x"] = table[x].astype(str)
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for method in methods:
            points = table[table["method"] == method].dropna(subset=column)
            width = 2.5 if method.startswith("more") else 1.2
            axis.plot(points["x"], points[column], marker="o", ms=4, lw=width, label=method)
        if f"{column}_before" in table:
            before = table.drop_duplicates("x")
            axis.plot(before["x"], before[f"{column}_before"], color="black", ls=":", label="before")
        axis.set_title(title, fontsize=10)
        axis.tick_params("x", rotation=35 if x == "level" else 0)
        axis.set_xlabel(x.replace("_", " "))
        axis.grid(alpha=0.3)
    legend_below(figure)
    write_figure(path, figure)


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
