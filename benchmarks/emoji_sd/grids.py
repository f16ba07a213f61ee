"""Pictures for the README: grids of images with the artists' and things' names."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from more_hf_bench.figures import write_picture


GRID_THINGS = (
    "rocket", "pizza", "cat face", "red heart", "sunflower", "guitar", "bicycle", "crab", "mushroom", "house",
)  # fmt: skip
CELL, LEFT, TOP = 68, 96, 14


def draw_grid(path: Path, data, pairs: list[tuple[int, int]], images: torch.Tensor, groups: dict) -> None:
    """
    Artists are rows. A thing's name stands over each image; "*" marks a pair that no training image shows.
    """
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
    write_picture(path, canvas)
