"""Emoji as a data set of a hundred classes: a thing is a class, its artists' drawings, moved and recoloured a little, are its images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate


CLASSES = 100
HELD_OUT = 2  # drawings of each thing that only the test set has
TRAIN_VIEWS, TEST_VIEWS = 25, 5  # images made of one drawing


def hundred_things(folder: Path, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """Read what `benchmarks/emoji_sd/data.py` rendered.

    Returns `(images, labels)` for training and for test, uint8 `(n, 3, size, size)` and int64 `(n,)`, and the class names. Which drawings
    are held out, and how each image is moved and recoloured, is always the same.
    """
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    with np.load(folder / "images.npz") as arrays:
        images, names = arrays["images"], arrays["name"]
    drawings = {thing: (names == meta["names"].index(thing)).nonzero()[0] for thing in meta["things"]}
    most_drawn = sorted(drawings, key=lambda thing: -len(drawings[thing]))[:CLASSES]
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for thing in most_drawn:
        rows = torch.from_numpy(drawings[thing])[torch.randperm(len(drawings[thing]), generator=generator)]
        test.append(rows[:HELD_OUT])
        train.append(rows[HELD_OUT:])
    parts = []
    for groups, count in ((train, TRAIN_VIEWS), (test, TEST_VIEWS)):
        labels = torch.cat([torch.full((len(rows) * count,), label) for label, rows in enumerate(groups)])
        drawn = torch.from_numpy(images[torch.cat(groups)]).permute(0, 3, 1, 2) / 127.5 - 1
        small = interpolate(drawn, (size, size), mode="bilinear", antialias=True)
        parts.append((views(small.repeat_interleave(count, 0), generator), labels))
    return *parts, tuple(thing.replace("-", " ") for thing in most_drawn)


def views(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 images of pixels `(n, 3, size, size)` in [−1, 1]: each mirrored or not, turned by at most 15 degrees, scaled by 0.8 to 1.1,
    shifted by at most a sixteenth, its contrast and brightness changed by at most a fifth. Outside of an image is white."""
    n = len(pixels)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    mirror = draw(0, 1).round() * 2 - 1
    angle, scale = draw(-15, 15) * math.pi / 180, draw(0.8, 1.1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cos * mirror, -sin, draw(-1 / 8, 1 / 8), sin * mirror, cos, draw(-1 / 8, 1 / 8)], dim=1).reshape(n, 2, 3)
    contrast, brightness = draw(0.8, 1.2)[:, None, None, None], draw(-0.2, 0.2)[:, None, None, None]
    ink = grid_sample(1 - pixels, affine_grid(theta, list(pixels.shape), align_corners=False), align_corners=False)
    shown = ((1 - ink) * contrast + brightness).clamp(-1, 1)
    return ((shown + 1) * 127.5).round().to(torch.uint8)
