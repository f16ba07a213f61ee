"""What a benchmark forgets: artists, or things."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """
    One kind of concept. A prompt may name an artist, a thing or both; one of the two is forgotten.

    Attributes:
        name (`str`):
            What `--kind` calls it.
        one (`str`):
            The column of prompts and rows that names it, and the word for one of it.
        gone (`str`):
            What the judges must no longer see of what is forgotten, by the name of its columns: `"style"` or
            `"content"`.
        kept (`str`):
            What else they see in the same pictures.
        spared (`"f"` or `"r"`):
            Whose pictures must still show what was asked for, for a method to qualify: the forgotten ones, or
            the rest.
        condition (`str`):
            When a method qualifies, in words, with the two limits in percent.
    """

    name: str
    one: str
    gone: str
    kept: str
    spared: Literal["f", "r"]
    condition: str


ARTISTS = Kind(
    name="artists",
    one="artist",
    gone="style",
    kept="content",
    spared="f",
    condition="leave the style in at most {:g} % of the forgotten artist's pictures (style_f) and keep "
    "what they show in at least {:g} % of those that showed it before (content_f)",
)
THINGS = Kind(
    name="things",
    one="thing",
    gone="content",
    kept="style",
    spared="r",
    condition="leave the thing in at most {:g} % of the forgotten things' pictures (content_f) and keep "
    "the others in at least {:g} % of those that showed theirs before (content_r)",
)
KINDS = {kind.name: kind for kind in (ARTISTS, THINGS)}
