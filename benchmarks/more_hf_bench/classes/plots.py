"""Plots: the feature space (the paper's Fig. 1), cosines of class means (Figs. 3, 6), cost (Fig. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..figures import panels, write_figure
from ..run import Cell
from .metrics import prototype_cosines
from .store import ClassesConfig


if TYPE_CHECKING:
    from matplotlib.figure import Figure


PANELS = 12  # methods
PANEL = {"width": 3.6, "height": 3.4}


def write_plots(
    folder: Path, config: ClassesConfig, cells: Sequence[Cell], summary: Sequence[Mapping[str, Any]]
) -> None:
    """Write `tsne.png` and `cosines.png` of the first entry of `forget`, with seed 0, and `cost.png`."""
    first = next(iter(config.forget))
    arrays: dict[str, np.ndarray] = {}
    for cell in cells:
        if cell.forget == first and cell.seed == 0:
            with np.load(cell.path.with_suffix(".npz")) as held:
                arrays |= dict(held)
    names = [key.removesuffix("/features") for key in arrays if key.endswith("/features")]
    variants = ("-reloaded", "-inverted")
    shown = [name for name in names if not name.endswith(variants) and "-x" not in name][:PANELS]
    classes = config.class_names
    forgotten = [classes.index(name) for name in config.forget[first]]

    features = {name: arrays[f"{name}/features"] for name in shown}
    write_figure(folder / "tsne.png", _tsne(features, arrays["labels"], classes, forgotten))
    after = {name: arrays[f"{name}/means"] for name in shown if name != "original"}
    if "original/means" in arrays and after:
        write_figure(folder / "cosines.png", _cosines(arrays["original/means"], after, classes, forgotten))
    entries = [line["forget"] for line in summary]
    entry = "all" if "all" in entries else first
    lines = [line for line in summary if line["forget"] == entry and line["method"] in config.methods]
    write_figure(folder / "cost.png", _cost([line for line in lines if line["method"] != "original"]))


def _tsne(
    features: Mapping[str, np.ndarray], labels: np.ndarray, classes: Sequence[str], forgotten: Sequence[int]
) -> Figure:
    """One panel per method: test features in two dimensions, forgotten classes in red."""
    from matplotlib import colormaps
    from sklearn.manifold import TSNE

    figure, axes = panels(len(features), **PANEL)
    remaining = [c for c in range(len(classes)) if c not in forgotten]
    # Few classes have a colour each, none of them the red of the forgotten; many share one.
    palette = colormaps["tab20"].colors
    colours = [palette[i] for i in (0, 2, 4, 8, 10, 12, 14, 16, 18, 1, 3, 5, 9, 11, 13, 15, 17, 19)]
    is_told_apart = len(remaining) <= len(colours)
    for axis, (name, z) in zip(axes, features.items(), strict=True):
        embedding = TSNE(random_state=0, init="pca", perplexity=min(30, (len(z) - 1) / 3), max_iter=500)
        points = embedding.fit_transform(z.astype(np.float64))
        for i, c in enumerate(remaining):
            colour = colours[i] if is_told_apart else "tab:blue"
            axis.scatter(*points[labels == c].T, s=5, color=colour, linewidths=0, label=classes[c])
        for c in forgotten:
            label = f"{classes[c]} (forgotten)"
            axis.scatter(*points[labels == c].T, s=9, color="red", linewidths=0, label=label)
        axis.set_title(name)
        axis.set_xticks([])
        axis.set_yticks([])
    handles, names = axes[0].get_legend_handles_labels()
    if not is_told_apart:
        # One entry for each kind.
        handles, names = [handles[0], handles[-1]], ["remaining classes", "forgotten classes"]
    figure.legend(handles, names, loc="outside lower center", ncols=6, markerscale=3, fontsize=9)
    return figure


def _cosines(
    before: np.ndarray, after: Mapping[str, np.ndarray], classes: Sequence[str], forgotten: Sequence[int]
) -> Figure:
    """One panel per method: class means before (rows) against after (columns)."""
    figure, axes = panels(len(after), **PANEL)
    for axis, (name, means) in zip(axes, after.items(), strict=True):
        cosines = prototype_cosines(torch.from_numpy(before), torch.from_numpy(means))
        image = axis.imshow(cosines.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(f"{name}: before (rows), after", fontsize=9)
        if len(classes) <= 20:
            axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
            axis.set_yticks(range(len(classes)), classes, fontsize=7)
        for c in forgotten:
            axis.axvline(c - 0.5, color="tab:red", lw=0.8)
            axis.axvline(c + 0.5, color="tab:red", lw=0.8)
        figure.colorbar(image, ax=axis, fraction=0.046)
    return figure


def _cost(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Time, logarithmic, and peak memory of every method, one bar each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.7 * max(4, len(lines)), 6), layout="constrained")
    seconds, memory = figure.subplots(2, 1, sharex=True)
    seconds.set_yscale("log")
    for axis, column, unit in ((seconds, "seconds", "seconds"), (memory, "peak_memory", "MiB")):
        axis.bar([line["method"] for line in lines], [line[column] or 0 for line in lines], color="tab:blue")
        axis.set_ylabel(unit)
        axis.tick_params("x", rotation=60)
    return figure
