"""Prompts that name a concept, and ordinary prompts that do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files

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

    The list whose words the tokenizer splits into fewer pieces is used, since an encoder knows the words that
    its tokenizer keeps whole.
    """
    tokenizer = tokenizer_in(tokenizer)

    def pieces_per_word(prompts: tuple[str, ...]) -> float:
        pieces = tokenizer(list(prompts), verbose=False).input_ids
        words = [prompt.split() for prompt in prompts]
        return sum(map(len, pieces)) / sum(map(len, words))

    lists = packaged_prompts("everyday_prompts.txt"), packaged_prompts("emoji_prompts.txt")
    return min(lists, key=pieces_per_word)
