"""Every method by the number of names that are forgotten at once: `sizes.csv` and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..figures import write_figure
from .kinds import Kind
from .ranking import RankedMethod, contenders, plot_method, rank
from .rows import Row


Sizes = Mapping[int, Sequence[RankedMethod]]


def rank_sizes(rows: Sequence[Row]) -> dict[int, list[RankedMethod]]:
    """Number of names that an erasure forgets -> the ranking over all erasures of that size, if any."""
    ranked = {size: rank(rows, size) for size in sorted({len(row.forgotten) for row in rows})}
    return {size: ranking for size, ranking in ranked.items() if ranking}


def size_rows(sizes: Sizes) -> list[dict[str, Any]]:
    """The lines of `sizes.csv`."""
    return [{"at_once": size, **asdict(line)} for size, ranking in sizes.items() for line in ranking]


def write_sizes_plot(path: Path, sizes: Sizes, kind: Kind) -> None:
    """
    Draw three panels over the number of names, with a line for each method that can win; dotted: before.
    """
    from matplotlib.figure import Figure

    lines = [(size, line) for size, ranking in sizes.items() for line in ranking]
    methods = sorted(contenders(line.method for _, line in lines))
    titles = {
        "gone_f": f"forgotten {kind.name} recognised, %",
        "gone_r": f"other {kind.name} recognised, %",
        "lpips_d": "LPIPS: forgotten moved − others moved",
    }
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axis, (column, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for method in methods:
            points = {size: getattr(line, column) for size, line in lines if line.method == method}
            plot_method(axis, method, points)
        if column != "lpips_d":
            before = {size: getattr(line, f"{column}_before") for size, line in lines}
            axis.plot(list(before), list(before.values()), color="black", linestyle=":", label="before")
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log")
        axis.set_xticks(list(sizes), labels=list(map(str, sizes)))
        axis.minorticks_off()
        axis.set_xlabel(f"{kind.name} forgotten at once")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    write_figure(path, figure)
