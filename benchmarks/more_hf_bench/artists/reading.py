"""Check that the text encoder can read the names in the prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable

from more_hf.diffusion.encoder import Encoder

from .prompts import PromptRow, Prompts


def known(encoder: Encoder, names: Iterable[str]) -> list[str]:
    """
    The names with a word that the tokenizer keeps whole. The model cannot have learned much about the others:
    it reads them letter by letter, like any made-up word.
    """
    words = {name: re.findall(r"\w+", name) for name in names}
    return [name for name in words if any(len(encoder.token_ids(word)) == 1 for word in words[name])]


def cut_off(encoder: Encoder, prompts: Prompts) -> list[PromptRow]:
    """The rows whose name ends after the part of the prompt that the text encoder reads."""
    segment = encoder.text.segments[0]
    room = encoder.length - segment.before - segment.ends
    cut = []
    for row in prompts.rows:
        name = prompts.concept(row)
        if not name:
            continue
        # People write the whole name, the part before a colon, or the surname.
        forms = sorted({name, name.split(":")[0], name.split()[-1]}, key=len, reverse=True)
        matches = re.finditer("|".join(map(re.escape, forms)), row.prompt, re.IGNORECASE)
        end = max((match.end() for match in matches), default=0)
        if len(encoder.token_ids(row.prompt[:end])) > room:
            cut.append(row)
    return cut
