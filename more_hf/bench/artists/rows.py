"""One measured picture: a row of `rows.csv`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from .. import columns


ORIGINAL = "original"  # in the column `method`: the pipeline without an edit
SEPARATOR = "; "  # between the names in `remap_to` and `retain`
JOINT = "+"  # between the artists in `forget` that are erased in one call

When = Literal["before", "after"]


@dataclass(frozen=True)
class Row:
    """
    One picture of an erased pipeline, next to the original's picture from the same noise.

    Attributes:
        method, forget (`str`):
            The method, and the artists that it erased, joined by `+`.
        remap_to, retain (`str`):
            The names that the method was given, joined by `; `.
        case_number, evaluation_seed, artist, thing, group, prompt:
            The prompt's, as in [`~more_hf.bench.artists.prompts.PromptRow`].
        sample (`int`):
            Which of the prompt's images, from 0.
        lpips, lpips_64, lpips_64_rece (`float`):
            The distance between the two pictures, at native size and resized to 64 pixels in two ways.
        style_before, style_after (`str`):
            The artist that the judge takes each picture for; empty without a judge.
        content_before, content_after (`int`, *optional*):
            Whether (1, 0) the judge sees the prompt's thing in each.
        seconds, seconds_prepare (`float`, *optional*):
            For this picture, and for the erasure.
        peak_memory (`float`, *optional*):
            MiB, of the erasure.
        before, after (`str`):
            The two picture files.
    """

    method: str
    forget: str
    remap_to: str
    retain: str
    case_number: int
    sample: int
    evaluation_seed: int
    artist: str
    thing: str
    group: str
    prompt: str
    lpips: float
    lpips_64: float
    lpips_64_rece: float
    style_before: str
    style_after: str
    content_before: int | None
    content_after: int | None
    seconds: float | None
    seconds_prepare: float | None
    peak_memory: float | None
    before: str
    after: str

    @property
    def forgotten_artists(self) -> list[str]:
        """The artists that the row's erasure forgets."""
        return artists_of(self.forget)

    @property
    def is_forgotten(self) -> bool:
        """Whether the picture is of an artist that the erasure forgets."""
        return self.artist in self.forgotten_artists

    @property
    def named_artists(self) -> set[str]:
        """The names that the erasure was given: targets and names to keep."""
        return {*self.remap_to.split(SEPARATOR), *self.retain.split(SEPARATOR)}

    @property
    def case(self) -> tuple[str, int, int]:
        """What the rows of all methods for one picture have in common."""
        return self.forget, self.case_number, self.sample

    def judged(self, when: When) -> tuple[str, int | None]:
        """The artist that the judge takes the picture for, and whether it sees the row's thing."""
        if when == "before":
            return self.style_before, self.content_before
        return self.style_after, self.content_after

    def style(self, when: When) -> float | None:
        """100 if the judge recognises the row's artist, else 0; `None` if nobody judged."""
        taken_for, _ = self.judged(when)
        return 100.0 * (taken_for == self.artist) if taken_for else None

    def content(self, when: When) -> float | None:
        """100 if the judge sees the row's thing, else 0; `None` if nobody judged."""
        _, is_seen = self.judged(when)
        return None if is_seen is None else 100.0 * is_seen


_TYPES = {"str": str, "int": int, "int | None": int, "float": float, "float | None": float}
COLUMNS = [columns.Column(field.name, _TYPES[field.type]) for field in fields(Row)]


def artists_of(forget: str) -> list[str]:
    """The artists of one entry of `forget`."""
    return forget.split(JOINT)


def read_rows(path: str | Path) -> list[Row]:
    """
    Read `rows.csv`.

    Raises:
        ValueError: if a column is missing, or a cell is not of its column's type.
    """
    return [Row(**row) for row in columns.read_rows(path, COLUMNS)]
