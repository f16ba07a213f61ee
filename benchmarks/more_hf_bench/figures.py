"""Figures of several panels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """Write a figure as PNG."""
    with replacing(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
