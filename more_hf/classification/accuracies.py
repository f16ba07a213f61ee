"""Every class's accuracy before and after an erasure, and what its samples became: a table and a picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from PIL import Image, ImageDraw, ImageFont

from ..core.markdown import markdown_table


LISTED = 40  # classes that a table or a picture shows at most
CELL, GAP, SIZE = 18, 8, 13  # of the picture: pixels of a cell, between parts, and of a letter
OTHERS = "others"


@dataclass(frozen=True)
class ClassAccuracy:
    """How one class's samples are classified."""

    name: str
    forgotten: bool
    count: int  # how many samples it has
    before: float | None  # percent of them that the original gets right; `None` if the original is not here
    after: float  # percent of them that the model gets right
    # percent of them that the original and the model give to each class, the most frequent first
    was: Mapping[str, float] = field(default_factory=dict)
    became: Mapping[str, float] = field(default_factory=dict)

    @property
    def change(self) -> float:
        """How far the accuracy moved; the accuracy itself if nothing is known of before."""
        return self.after - (self.before or 0)


@dataclass(frozen=True)
class Accuracies:
    """
    Every class's accuracy before and after an erasure, as `more_hf.compare` returns it for a classifier.

    Args:
        classes (`tuple[ClassAccuracy, ...]`):
            Every class that the data has samples of, in the model's order.
    """

    classes: tuple[ClassAccuracy, ...]

    @classmethod
    def from_facts(cls, accuracy: Mapping[str, Mapping[str, float]], forgotten: Collection[str]) -> Self:
        """The inverse of `to_facts`."""
        classes = []
        for name, one in accuracy.items():
            found = name in forgotten, int(one["images"]), one["before"], one["after"]
            classes.append(ClassAccuracy(name, *found))
        return cls(tuple(classes))

    def to_facts(self) -> dict[str, dict[str, float]]:
        """The accuracies as `ClassFacts.accuracy` holds them."""
        return {
            one.name: {"images": one.count, "before": one.before, "after": one.after} for one in self.classes
        }

    @property
    def listed(self) -> tuple[ClassAccuracy, ...]:
        """What a table shows: all, or of many those that are forgotten or moved farthest."""
        first = sorted(self.classes, key=lambda one: (not one.forgotten, -abs(one.change)))[:LISTED]
        return tuple(one for one in self.classes if one in first)

    @property
    def lost(self) -> list[ClassAccuracy]:
        """The classes that are not forgotten and lost accuracy, the one that lost most first."""
        kept = [one for one in self.classes if not one.forgotten and one.change < 0]
        return sorted(kept, key=lambda one: one.change)

    def together(self, *, forgotten: bool) -> ClassAccuracy | None:
        """All forgotten classes as one, over all of their samples, or all the others; `None` for none."""
        part = [one for one in self.classes if one.forgotten == forgotten]
        name = "forgotten, together" if forgotten else "the others, together"
        return _joined(name, part) if part else None

    def to_markdown(self) -> str:
        """A table in percent, with the accuracy over all samples of forgotten classes and of the others."""
        listed = self.listed
        rows = [_row(one, f"{one.name} (forgotten)" if one.forgotten else one.name) for one in listed]
        left_out = [one for one in self.classes if one not in listed]
        if left_out:
            rows.append(_row(_joined(f"{len(left_out)} that moved less", left_out)))
        for part in (self.together(forgotten=True), self.together(forgotten=False)):
            if part is not None:
                rows.append(_row(part))
        return markdown_table(rows)

    def to_picture(self) -> Image.Image:
        """
        Draw which class the samples of each class are given, before and after: a row for each class that
        `listed` has, its samples' shares from left to right, dark for all of them. Forgotten classes are red.
        """
        listed = self.listed
        names = [one.name for one in listed]
        font = ImageFont.load_default(SIZE)
        columns = [*names, OTHERS]
        left = GAP + max(int(font.getlength(name)) for name in columns) + GAP
        parts = {"before": [one.was for one in listed], "after": [one.became for one in listed]}
        parts = {title: shares for title, shares in parts.items() if any(shares)}
        wide, high, top = CELL * len(columns), CELL * len(names), 2 * GAP + SIZE
        sheet = Image.new("RGB", (left + len(parts) * (wide + GAP), top + high + left), "white")
        draw = ImageDraw.Draw(sheet)

        # 1. The names of the rows, once, and of the columns below each part.
        for row, one in enumerate(listed):
            place = left - GAP, top + CELL * row + CELL // 2
            draw.text(place, one.name, _ink(one.forgotten), font, anchor="rm")
        below = Image.new("RGB", (left, wide), "white")
        for column, name in enumerate(columns):
            place = left - GAP, CELL * column + CELL // 2
            forgotten = column < len(listed) and listed[column].forgotten
            ImageDraw.Draw(below).text(place, name, _ink(forgotten), font, anchor="rm")
        turned = below.rotate(90, expand=True)

        # 2. The shares.
        for part, (title, shares) in enumerate(parts.items()):
            x = left + part * (wide + GAP)
            draw.text((x, GAP), title, "black", font)
            for row, given in enumerate(shares):
                cells = [given.get(name, 0.0) for name in names]
                for column, share in enumerate([*cells, max(0.0, 100 - sum(cells))]):
                    shade = round(255 * (1 - share / 100))
                    corner = x + CELL * column, top + CELL * row
                    box = (*corner, corner[0] + CELL - 2, corner[1] + CELL - 2)
                    draw.rectangle(box, (shade, shade, 255 - (255 - shade) // 2), (225, 225, 225))
            sheet.paste(turned, (x, top + high))
        return sheet

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def _joined(name: str, classes: Sequence[ClassAccuracy]) -> ClassAccuracy:
    """Several classes as one, over all of their samples."""
    count = sum(one.count for one in classes)
    after = sum(one.count * one.after for one in classes) / count
    before = None
    if classes[0].before is not None:
        before = sum(one.count * one.before for one in classes) / count
    return ClassAccuracy(name, classes[0].forgotten, count, before, after)


def _row(one: ClassAccuracy, name: str | None = None) -> dict[str, Any]:
    """A line of the table."""
    before = {} if one.before is None else {"before": one.before}
    return {"class": name or one.name, "samples": one.count, **before, "after": one.after}


def _ink(forgotten: bool) -> str:
    return "firebrick" if forgotten else "black"
