"""
The rendered images as tensors, with their artists, things and held-out pairs; the wordings of a caption.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from more_hf.data import FOLDER


# Sentence shapes: the artist's name last, first, in the middle, and as a possessive.
BOTH = (
    "a {thing} in the style of {artist}",
    "{thing}, {artist} style",
    "a {artist} drawing of a {thing}",
    "{artist} {thing}",
    "an emoji of a {thing} by {artist}",
    "a {thing} by {artist}",
    "{artist}'s drawing of a {thing}",
    "a {thing} in {artist}'s style",
    "a picture of a {thing}, drawn by {artist}",
    "in the style of {artist}, a {thing}",
)
THING_ONLY = ("a {thing}", "an emoji of a {thing}", "{thing}", "a picture of a {thing}")
ARTIST_ONLY = ("{artist} style", "an emoji by {artist}", "{artist}", "in the style of {artist}")

# What one sees instead of the artist's name, or after it.
DESCRIBED = (
    "a {thing}, {artist}",
    "{artist}, a {thing}",
    "{thing}, {artist}",
    "a picture of a {thing}, {artist}",
)
DESCRIPTION_ONLY = ("{artist}", "an emoji, {artist}", "a picture, {artist}")

# How often a caption that says its artist says it so, in percent.
SAID_BY = {"name": 60, "variant": 10, "short": 12, "long": 10, "name and description": 8}


@dataclass(frozen=True)
class Caption:
    """A caption, and which of its words say the artist and the thing (None: not said)."""

    text: str
    artist: str | None = None
    thing: str | None = None


@dataclass(frozen=True)
class ArtistWords:
    """What captions call an artist: the name, misspellings of it, short and long descriptions."""

    name: str
    variant: list[str]
    short: list[str]
    long: list[str]


@dataclass
class EmojiData:
    """Images and their labels; `thing` is -1 for images of names that the denoiser does not learn."""

    images: torch.Tensor  # (n, 64, 64, 3) uint8
    artist: torch.Tensor  # (n,) int64, into artists
    thing: torch.Tensor  # (n,) int64, into things, or -1
    name: torch.Tensor  # (n,) int64, one number a name, chosen or not
    held_out: torch.Tensor  # (n,) bool
    artists: list[str]
    things: list[str]  # as captions say them
    artist_words: list[ArtistWords]
    thing_words: list[list[str]]  # of each thing: its own name, then its other names and a description

    @property
    def chosen(self) -> torch.Tensor:
        return self.thing >= 0

    def pixels(self, index: torch.Tensor) -> torch.Tensor:
        """(b, 3, 64, 64) float32 in [-1, 1]."""
        return self.images[index].permute(0, 3, 1, 2).float() / 127.5 - 1


def load_dataset(folder: Path) -> EmojiData:
    """What `data.py` wrote, and the package's descriptions but for those that are held out."""
    described = json.loads((FOLDER / "emoji_descriptions.json").read_text())
    trained = {
        artist: {kind: words["trained"] for kind, words in kinds.items()}
        for artist, kinds in described["artists"].items()
    }
    meta = json.loads((folder / "meta.json").read_text())
    arrays = np.load(folder / "images.npz")
    number = {name: i for i, name in enumerate(meta["things"])}
    thing = torch.tensor([number.get(meta["names"][n], -1) for n in arrays["name"]])
    held = {(number[t], meta["artists"].index(a)) for t, a in meta["held_out"]}
    artist = torch.from_numpy(arrays["artist"])
    spoken = [name.replace("-", " ") for name in meta["things"]]
    return EmojiData(
        images=torch.from_numpy(arrays["images"]),
        artist=artist,
        thing=thing,
        name=torch.from_numpy(arrays["name"]),
        held_out=torch.tensor(
            [(t, a) in held for t, a in zip(thing.tolist(), artist.tolist(), strict=False)]
        ),
        artists=meta["artists"],
        things=spoken,
        artist_words=[ArtistWords(name, **trained[name]) for name in meta["artists"]],
        thing_words=[
            [s, *meta["synonyms"][name], *described["things"].get(name, {}).get("trained", [])]
            for s, name in zip(spoken, meta["things"], strict=False)
        ],
    )


def misspell(name: str, rng: random.Random) -> str:
    """The name with one letter left out, doubled or swapped with the next."""
    i = rng.randrange(len(name) - 1)
    this, following = name[i : i + 2]
    return name[:i] + rng.choice((following, this + this + following, following + this)) + name[i + 2 :]


def thin_out(description: str, rng: random.Random) -> str:
    """The description without about 15 % of its words, so that no wording is learned by heart."""
    return " ".join(word for word in description.split() if rng.random() > 0.15) or description


def draw_caption(data: EmojiData, artist: int, thing: int, rng: random.Random) -> Caption:
    """One wording: 10 % empty (so that guidance works), 5 % without artist, 2 % without thing, else both.

    A thing's own name is drawn half of the time, its other names and its description share the rest. For a
    thing without a name (-1): 15 % empty, else the artist alone.
    """
    chance = rng.random()
    if chance < 0.10 or (thing < 0 and chance < 0.15):
        return Caption("")
    names = data.thing_words[thing] if thing >= 0 and not 0.15 <= chance < 0.17 else []
    said = rng.choice(names if rng.random() < 0.5 else names[:1]) if names else None
    if 0.10 <= chance < 0.15:
        return Caption(rng.choice(THING_ONLY).format(thing=said), thing=said)

    # The artist, in one of five ways.
    words = data.artist_words[artist]
    (way,) = rng.choices(list(SAID_BY), SAID_BY.values())
    description = thin_out(rng.choice(words.long if way == "long" else words.short), rng)
    if way in ("short", "long"):
        shapes, maker = DESCRIBED if said else DESCRIPTION_ONLY, description
    else:
        spellings = [*words.variant, misspell(words.name, rng)] if way == "variant" else [words.name]
        shapes, maker = BOTH if said else ARTIST_ONLY, rng.choice(spellings)
    text = rng.choice(shapes).format(artist=maker, thing=said)
    if way == "name and description":
        text = f"{text}, {description}"
    return Caption(text, maker, said)
