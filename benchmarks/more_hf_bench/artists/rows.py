"""One measured picture: a row of `rows.csv`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .. import columns
from .config import ArtistsConfig, Erasure, artists_of
from .kinds import ARTISTS, Kind


ORIGINAL = "original"  # in the column `method`: the pipeline without an edit
SEPARATOR = "; "  # between the names in `remap_to` and `retain`

When = Literal["before", "after"]


@dataclass(frozen=True)
class Row:
    """
    One picture of an erased pipeline, next to the original's picture from the same noise.

    Attributes:
        method, forget (`str`):
            The method, and the names that it erased, joined by `+`, or the configuration's label for them.
        remap_to, retain (`str`):
            The method's targets and the names to keep, joined by `; `; for a labelled set, the number of
            names to keep.
        case_number, evaluation_seed, artist, thing, group, prompt, level:
            The prompt's, as in [`~more_hf_bench.artists.prompts.PromptRow`].
        sample (`int`):
            The number of the prompt's image, from 0.
        lpips, lpips_64, lpips_64_rece (`float`):
            The distance between the two pictures, at native size and resized to 64 pixels in two ways.
        style_before, style_after (`str`):
            The artist that the judge takes each picture for; empty without a judge.
        content_before, content_after (`int`, *optional*):
            Whether (1, 0) the judge sees the prompt's thing in each.
        seconds, seconds_prepare (`float`, *optional*):
            The time for this picture, and for the erasure.
        peak_memory (`float`, *optional*):
            Memory of the erasure in MiB.
        before, after (`str`):
            The two picture files.
        kind (`Kind`, *optional*), erasure (`Erasure`, *optional*):
            From the configuration of the row's erasure. These are not columns.
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
    level: str = ""
    kind: Kind = ARTISTS
    erasure: Erasure | None = field(default=None, repr=False)

    @property
    def concept(self) -> str:
        """The row's artist or thing, whichever the benchmark forgets; empty if the prompt names none."""
        return getattr(self, self.kind.one)

    @property
    def forgotten(self) -> list[str]:
        """The names that the row's erasure forgets."""
        return artists_of(self.forget) if self.erasure is None else self.erasure.forgotten(self.forget)

    @property
    def is_forgotten(self) -> bool:
        """Whether the picture is of an artist or a thing that the erasure forgets."""
        return self.concept in self.forgotten

    @property
    def is_named(self) -> bool:
        """Whether the picture's artist or thing was passed to the method, as a target or to keep."""
        targets = self.remap_to.split(SEPARATOR)
        retain = self.retain.split(SEPARATOR) if self.erasure is None else self.erasure.retain
        return self.concept in targets or self.concept in retain

    @property
    def cells(self) -> dict[str, Any]:
        """The row's line of `rows.csv`."""
        return {column.name: getattr(self, column.name) for column in COLUMNS}

    @property
    def case(self) -> tuple[str, int, int]:
        """The key that the rows of all methods for one picture share."""
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
COLUMNS = [
    columns.Column(each.name, _TYPES[each.type], added=each.default is not MISSING)
    for each in fields(Row)
    if each.type in _TYPES
]


def read_rows(path: str | Path, config: ArtistsConfig | None = None) -> list[Row]:
    """
    Read `rows.csv`.

    Args:
        path (`str` or `Path`):
            The file.
        config (`ArtistsConfig`, *optional*):
            The folder's configuration. Without it, rows are about artists, and `forget` names them.

    Raises:
        ValueError: a column is missing, or a cell is not of its column's type.
    """
    rows = columns.read_rows(path, COLUMNS)
    if config is None:
        return [Row(**row) for row in rows]
    return [Row(**row, kind=config.of_kind, erasure=config.forget[row["forget"]]) for row in rows]
