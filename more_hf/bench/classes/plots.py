"""Plots of a knowledge-deletion benchmark: the feature space (the paper's Fig. 1), cosines of class means (Figs. 3, 6), cost (Fig. 5)."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .similarity import prototype_cosines
from .summary import POOLED


PANELS = 12  # methods, four to a row


def write_plots(folder: Path, config: Mapping[str, Any], cells: Sequence[Any], summary: Sequence[Mapping[str, Any]]) -> None:
    """Write `tsne.png` and `cosines.png` of the first entry of `forget`, from what its cells of seed 0 kept, and `cost.png`."""
    first = next(iter(config["forget"]))
    kept: dict[str, np.ndarray] = {}
    for path in (cell.path.with_suffix(".npz") for cell in cells if cell.forget == first and cell.seed == 0):
        with np.load(path) as held:
            kept |= dict(held)
    names = [key.removesuffix("/features") for key in kept if key.endswith("/features")]
    shown = [name for name in names if not name.endswith("-reloaded") and "-x" not in name][:PANELS]
    classes = config["class_names"]
    forgotten = [classes.index(name) for name in config["forget"][first]]
    _write(folder / "tsne.png", _tsne({name: kept[f"{name}/features"] for name in shown}, kept["labels"], classes, forgotten))
    if "original/means" in kept:
        after = {name: kept[f"{name}/means"] for name in shown if name != "original"}
        if after:
            _write(folder / "cosines.png", _cosines(kept["original/means"], after, classes, forgotten))
    pooled = [line for line in summary if line["forget"] == POOLED] or [line for line in summary if line["forget"] == first]
    _write(folder / "cost.png", _cost([line for line in pooled if line["method"] in config["methods"] and line["method"] != "original"]))


def _tsne(features: Mapping[str, np.ndarray], labels: np.ndarray, classes: Sequence[str], forgotten: Sequence[int]):
    """One panel per method: test features in two dimensions, forgotten classes in red."""
    from matplotlib import colormaps
    from sklearn.manifold import TSNE

    figure, axes = _panels(len(features))
    remaining = [c for c in range(len(classes)) if c not in forgotten]
    for axis, (name, z) in zip(axes, features.items(), strict=False):
        flat = TSNE(random_state=0, init="pca", perplexity=min(30, (len(z) - 1) / 3), max_iter=500).fit_transform(z.astype(np.float64))
        for i, c in enumerate(remaining):
            mask = labels == c
            axis.scatter(*flat[mask].T, s=5, color=colormaps["Blues"](0.35 + 0.6 * i / len(remaining)), linewidths=0)
        for c in forgotten:
            axis.scatter(*flat[labels == c].T, s=9, color="tab:red", linewidths=0, label=classes[c])
        axis.set_title(name)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].legend(title="forgotten", fontsize=8, title_fontsize=8) if len(forgotten) <= 5 else None
    return figure


def _cosines(before: np.ndarray, after: Mapping[str, np.ndarray], classes: Sequence[str], forgotten: Sequence[int]):
    """One panel per method: class means before (rows) against after (columns)."""
    figure, axes = _panels(len(after))
    for axis, (name, means) in zip(axes, after.items(), strict=False):
        image = axis.imshow(prototype_cosines(torch.from_numpy(before), torch.from_numpy(means)).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(f"{name}: before (rows), after", fontsize=9)
        if len(classes) <= 20:
            axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
            axis.set_yticks(range(len(classes)), classes, fontsize=7)
        for c in forgotten:
            axis.axvline(c - 0.5, color="tab:red", lw=0.8)
            axis.axvline(c + 0.5, color="tab:red", lw=0.8)
        figure.colorbar(image, ax=axis, fraction=0.046)
    return figure


def _cost(lines: Sequence[Mapping[str, Any]]):
    """Time, logarithmic, and peak memory of every method, one bar each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.7 * max(4, len(lines)), 6), layout="constrained")
    for axis, (column, unit) in zip(figure.subplots(2, 1, sharex=True), (("seconds", "seconds"), ("peak_memory", "MiB")), strict=True):
        axis.bar([line["method"] for line in lines], [line[column] or 0 for line in lines], color="tab:blue")
        axis.set_yscale("log" if column == "seconds" else "linear")
        axis.set_ylabel(unit)
        axis.tick_params("x", rotation=60)
    return figure


def _panels(count: int):
    from matplotlib.figure import Figure

    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes


def _write(path: Path, figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_bytes(data.getvalue())
    beside.replace(path)
