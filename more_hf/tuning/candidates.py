"""What a concept may be sent to, and the sentences in which it is drawn: by the kind of thing that it is."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from diffusers import DiffusionPipeline
from torch.nn.functional import normalize

from ..core.errors import PrototypeError, shown
from ..core.request import names_in, read_names
from ..diffusion.encoder import Encoder, column, fit_prototypes, kinds_of
from ..diffusion.prompts import evenly, everyday_prompts, sentences_around, speaks_emoji
from ..diffusion.text import tokenizer_in


FEWEST = 2  # candidates, so that there is something to choose
# Sentences around a name of each kind; other kinds are things.
STYLES = (
    "a painting of a house by the sea by {}",
    "a portrait of an old man in the style of {}",
    "a bowl of fruit on a table, painting by {}",
    "a street in the rain in the style of {}",
    "a horse in a field by {}",
    "a woman reading at a window in the style of {}",
    "trees along a river, painting by {}",
    "a night sky above a town in the style of {}",
    "a ship in a storm, painting by {}",
    "a cat on a chair in the style of {}",
    "mountains behind a lake by {}",
    "a vase of flowers in the style of {}",
)
PEOPLE = (
    "a photo of {}",
    "a portrait of {} in a garden",
    "{} sitting at a desk",
    "{} walking down a street",
    "a close-up of the face of {}",
    "{} giving a speech",
    "{} drinking coffee in a kitchen",
    "a black and white photo of {}",
    "{} riding a bicycle",
    "{} on a mountain in winter",
    "{} playing the piano",
    "an oil painting of {} in a red coat",
)
THINGS = (
    "a photo of a {}",
    "a {} on a wooden table",
    "a drawing of a {} on white paper",
    "a {} in the snow",
    "a close-up of a {}",
    "a {} in front of a blue wall",
    "a {} at sunset on the beach",
    "an oil painting of a {}",
    "a {} next to a window",
    "a {} on grass in the sun",
    "a black and white photo of a {}",
    "a {} on a shelf of books",
)


@cache
def packaged_names(emoji: bool) -> Mapping[str, tuple[str, ...]]:
    """Kind -> names, for any model or for the embedded pipeline."""
    tables = tomllib.loads(files("more_hf").joinpath("data", "names.toml").read_text("utf-8"))
    return {kind: tuple(names) for kind, names in tables["emoji-sd" if emoji else "general"].items()}


def kind_of(pipe: DiffusionPipeline, concept: str) -> str:
    """The kind of a packaged list that has the concept, or that has the name nearest to it."""
    lists = packaged_names(speaks_emoji(pipe.tokenizer))
    for kind, names in lists.items():
        if concept.casefold() in map(str.casefold, names):
            return kind
    encoder = Encoder(pipe, ("{}",))
    kinds = {name: kind for kind, names in lists.items() for name in names}
    names = [concept, *kinds]
    found = fit_prototypes(encoder, names, "end", sigma_prompts={})["tokens"]
    position = kinds_of(encoder.text, "end", pooled=False)["tokens"][0]
    read = found.matrix[:, [found.index(column(name, position)) for name in names]].T
    # What all names have in common says nothing about any.
    read = normalize(read - read.mean(0), dim=1)
    return kinds[names[1 + int((read[1:] @ read[0]).argmax())]]


def looks_made_up(pipe: DiffusionPipeline, concept: str) -> bool:
    """Whether no packaged list has a name, and the tokenizer keeps none of its words whole."""
    lists = packaged_names(speaks_emoji(pipe.tokenizer))
    if any(names_in(concept, name) for names in lists.values() for name in names):
        return False
    words = tokenizer_in(pipe.tokenizer)(concept.split(), add_special_tokens=False).input_ids
    return all(len(pieces) > 1 for pieces in words)


def find_candidates(
    pipe: DiffusionPipeline, concept: str, kind: str, given: Sequence[str] | None
) -> tuple[str, ...]:
    """
    The candidates that were given, or the other names of a kind.

    Raises:
        `PrototypeError`: there are fewer than `FEWEST`, or one of them is the concept.
    """
    if given is None:
        names = packaged_names(speaks_emoji(pipe.tokenizer))[kind]
        names = tuple(name for name in names if not (names_in(name, concept) or names_in(concept, name)))
    else:
        names = tuple(dict.fromkeys(read_names("candidates", given)))
        own = [name for name in names if name.casefold() == concept.casefold()]
        if own:
            raise PrototypeError(
                f"{own[0]!r} is both the concept and in `candidates`. Remove it there: the concept cannot "
                "become itself."
            )
    if len(names) < FEWEST:
        raise PrototypeError(
            f"{concept!r} has {len(names)} candidates ({', '.join(names) or 'none'}), and a choice needs at "
            f"least {FEWEST}. Name more of its kind in `candidates`."
        )
    return names


def find_sentences(
    pipe: DiffusionPipeline, kind: str, given: Sequence[str] | None, count: int
) -> tuple[str, ...]:
    """
    `count` sentences with `{}` for a name, or those that were given. For the embedded pipeline they are its
    own ordinary prompts, since it knows no other words.
    """
    if given is not None:
        sentences = read_names("sentences", given)
        if not 2 <= len(sentences) <= count or any("{}" not in sentence for sentence in sentences):
            raise PrototypeError(
                f"`sentences` must be 2 to {count}, each with `{{}}` for a name, got {shown(sentences)}."
            )
        return sentences
    if speaks_emoji(pipe.tokenizer):
        names = packaged_names(emoji=True)[kind]
        return tuple(evenly(sentences_around(names, everyday_prompts(pipe.tokenizer)), count))
    return tuple(evenly({"artists": STYLES, "people": PEOPLE}.get(kind, THINGS), count))


def find_nameless(pipe: DiffusionPipeline, names: Sequence[str], count: int) -> tuple[str, ...]:
    """Ordinary prompts that hold neither one of the names nor a packaged artist or person."""
    lists = packaged_names(speaks_emoji(pipe.tokenizer))
    known = [*names, *lists["artists"], *lists.get("people", ())]
    # "Vincent van Gogh" is also "Van Gogh"
    known += [name.split()[-1] for name in known if len(name.split()) > 2]
    prompts = everyday_prompts(pipe.tokenizer)
    return tuple(evenly([line for line in prompts if not any(names_in(line, n) for n in known)], count))
