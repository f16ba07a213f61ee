"""Draw what the attacker sees, for each forgotten concept, attack and method."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from more_hf.diffusion.grid import draw_grid, stack

from ...figures import write_picture
from ..store import AttackConfig


SIDE = 64  # pixels of one picture


def write_grids(output: Path) -> None:
    """
    Write a picture for each forgotten concept next to the tables: a block for each form of each attack, with
    the last pictures of every method's victim; the attack by name comes first.

    Methods without pictures, because another machine made their rows, are left out.
    """
    config = AttackConfig.read(output)
    for concept in config.forget:
        folder = output / "pictures" / concept
        drawn = {method: _last_of_each(folder / method) for method in config.methods}
        forms = list(dict.fromkeys(form for forms in drawn.values() for form in forms))
        blocks = []
        for form in forms:
            rows = {method: _pictures(found[form]) for method, found in drawn.items() if form in found}
            blocks.append(draw_grid(rows, title=form.replace("_", ": ", 1).replace("_", " ")))
        if blocks:
            write_picture(output / f"{concept.lower().replace(' ', '-')}.webp", stack(blocks))


def _last_of_each(folder: Path) -> dict[str, Path]:
    """Form of an attack -> its file at the largest budget; by name first, then in alphabetical order."""
    last: dict[str, tuple[float, Path]] = {}
    for path in folder.glob("*.png"):
        form, _, budget = path.stem.rpartition("_")
        if form not in last or float(budget) > last[form][0]:
            last[form] = float(budget), path
    return {form: last[form][1] for form in sorted(last, key=lambda form: (form != "name", form))}


def _pictures(path: Path) -> list[Image.Image]:
    strip = Image.open(path)
    side = strip.height
    pictures = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
    return [picture.resize((SIDE, SIDE)) for picture in pictures]
