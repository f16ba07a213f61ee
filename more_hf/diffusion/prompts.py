"""Prompts that name a concept, and ordinary prompts that do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.resources import files
from itertools import cycle, islice

from ..core.request import names_in
from .text import tokenizer_in


# sentences around a name, for styles and for things
TEMPLATES = (
    "{}",
    "{} style",
    "a picture by {}",
    "an image of a tree by {}",
    "a house in the style of {}",
    "a horse in {}'s style",
    "{}'s drawing of a flower",
    "a {} drawing of a boat",
    "{} cat",
    "a chair, {} style",
    "a photo of a {}",
    "a {} on a table",
    "a small {} next to a dog",
    "a {} in the rain",
)


@cache
def packaged_prompts(file: str) -> tuple[str, ...]:
    """The lines of a file of prompts in the package."""
    lines = files("more_hf").joinpath("data", file).read_text("utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


def everyday_prompts(tokenizer: Callable) -> tuple[str, ...]:
    """
    The ordinary prompts behind Σ: one of the package's two lists, general prompts or the embedded pipeline's.
    """
    return packaged_prompts("emoji_prompts.txt" if speaks_emoji(tokenizer) else "everyday_prompts.txt")


def speaks_emoji(tokenizer: Callable) -> bool:
    """
    Whether the embedded pipeline's words are those that the tokenizer splits into fewer pieces, since an
    encoder knows the words that its tokenizer keeps whole.
    """
    tokenizer = tokenizer_in(tokenizer)

    def pieces_per_word(prompts: tuple[str, ...]) -> float:
        pieces = tokenizer(list(prompts), verbose=False).input_ids
        words = [prompt.split() for prompt in prompts]
        return sum(map(len, pieces)) / sum(map(len, words))

    general, emoji = packaged_prompts("everyday_prompts.txt"), packaged_prompts("emoji_prompts.txt")
    return pieces_per_word(emoji) < pieces_per_word(general)


def sentences_around(names: Iterable[str], prompts: Iterable[str]) -> list[str]:
    """The prompts that hold one of the names, with `{}` in its place; without repeats."""
    sentences: dict[str, None] = {}
    for name in names:
        word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
        sentences |= dict.fromkeys(word.sub("{}", line) for line in prompts if names_in(line, name))
    return list(sentences)


def evenly(lines: Sequence[str], count: int, rest: Sequence[str] = ()) -> list[str]:
    """`count` lines, evenly spaced in the list; or all of them, filled up from `rest` in turn."""
    if len(lines) >= count:
        return [lines[i * len(lines) // count] for i in range(count)]
    return [*lines, *islice(cycle(rest), count - len(lines))]
