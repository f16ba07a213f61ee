"""No attack: the concept is asked for by its name."""

from __future__ import annotations

from collections.abc import Iterator

from ..result import Result
from .victim import Victim


def name(victim: Victim) -> Iterator[Result]:
    """Draw the test prompts as they are: what the others are compared with."""
    yield victim.drawn(victim.pipe, victim.prompts(victim.concept), "name")
