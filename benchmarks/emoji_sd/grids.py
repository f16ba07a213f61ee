"""Pictures for the README: grids of images with the artists' and things' names, and the loss curves."""

import argparse
import csv
from pathlib import Path

import torch
from PIL import Image, ImageDraw


GRID_THINGS = (
    "rocket", "pizza", "cat face", "red heart", "sunflower", "guitar", "bicycle", "crab", "mushroom", "house",
)  # fmt: skip
CELL, LEFT, TOP = 68, 96, 14


def draw_grid(path: Path, data, pairs: list[tuple[int, int]], images: torch.Tensor, groups: dict) -> None:
    """Artists are rows. A thing's name stands over each image; "*" marks a pair that no training image shows."""
    unseen = {*groups["held_out"], *groups["undrawn"]}
    rows: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for (artist, thing), image in zip(pairs, images, strict=False):
        rows.setdefault(artist, []).append((thing, image))
    width = LEFT + CELL * max(len(row) for row in rows.values())
    canvas = Image.new("RGB", (width, (CELL + TOP) * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (artist, row) in enumerate(sorted(rows.items())):
        top = y * (CELL + TOP)
        draw.text((4, top + TOP + 24), data.artists[artist], fill="black")
        for x, (thing, image) in enumerate(row):
            mark = "*" if (artist, thing) in unseen else ""
            draw.text((LEFT + x * CELL + 2, top + 2), (mark + data.things[thing])[:12], fill="black")
            pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
            canvas.paste(Image.fromarray(pixels), (LEFT + x * CELL + 2, top + TOP + 2))
    canvas.save(path, optimize=True)


def draw_curves(log: Path, path: Path) -> None:
    """Every column of a training log over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(log) as file:
        rows = list(csv.DictReader(file))
    columns = [c for c in rows[0] if c not in ("step", "seconds", "learning_rate")]
    figure, axes = pyplot.subplots(1, len(columns), figsize=(4 * len(columns), 3), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=False):
        axis.plot([int(r["step"]) for r in rows], [float(r[column]) for r in rows], linewidth=0.8)
        axis.set(xlabel="step", title=column)
        axis.grid(alpha=0.3)
        if column in ("loss", "l1", "lpips"):
            axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a training log's curves.")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw_curves(arguments.log, arguments.output)
