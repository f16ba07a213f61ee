"""The kinds of concept that a benchmark forgets: artists, or things."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """
    One kind of concept. A prompt may name an artist, a thing or both; one of the two is forgotten.

    Attributes:
        name (`str`):
            Its name for `kind`, in the plural.
        one (`str`):
            The singular, which is also its column in prompts and rows.
        gone (`str`):
            The judgement that must no longer find what is forgotten: `"style"` or `"content"`, as in the
            columns' names.
        kept (`str`):
            The other judgement of the same pictures.
        spared (`"f"` or `"r"`):
            The pictures that must still show what their prompts ask for, for a method to qualify: the
            forgotten ones, or the others.
        condition (`str`):
            The condition to qualify, in words, with places for the two limits in percent.
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
