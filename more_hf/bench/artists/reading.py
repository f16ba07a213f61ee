"""What the text encoder reads of the names in the prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...diffusion.encoder import Encoder
from .prompts import PromptRow, Prompts


def known(encoder: Encoder, names: Iterable[str]) -> list[str]:
    """
    The names of which the tokenizer keeps a word whole. Of the others the model cannot have learned much: it
    reads them letter by letter, like any made-up word.
    """
    words = {name: re.findall(r"\w+", name) for name in names}
    return [name for name in words if any(len(encoder.token_ids(word)) == 1 for word in words[name])]


def cut_off(encoder: Encoder, prompts: Prompts) -> list[PromptRow]:
    """The rows whose name ends behind what the text encoder reads of the prompt."""
    segment = encoder.text.segments[0]
    room = encoder.length - segment.before - 1  # for the end token
    cut = []
    for row in prompts.rows:
        name = prompts.concept(row)
        # As people write it: the whole name, the part before a colon, or the surname.
        forms = {name, name.split(":")[0], name.split()[-1]} if name else set()
        ends = [found.end() for form in forms for found in re.finditer(re.escape(form), row.prompt, re.I)]
        if ends and len(encoder.token_ids(row.prompt[: max(ends)])) > room:
            cut.append(row)
    return cut
