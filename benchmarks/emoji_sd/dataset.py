"""
The rendered images as tensors, with their artists, things and held-out pairs; the wordings of a caption.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


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
    synonyms: list[list[str]]  # of each thing, its own name first

    @property
    def chosen(self) -> torch.Tensor:
        return self.thing >= 0

    def pixels(self, index: torch.Tensor) -> torch.Tensor:
        """(b, 3, 64, 64) float32 in [-1, 1]."""
        return self.images[index].permute(0, 3, 1, 2).float() / 127.5 - 1


def load_dataset(folder: Path) -> EmojiData:
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
        synonyms=[[s, *meta["synonyms"][name]] for s, name in zip(spoken, meta["things"], strict=False)],
    )


def all_captions(data: EmojiData) -> dict[tuple[int, int], list[str]]:
    """{(artist, thing): its wordings}, every one that training can draw; -1 stands for "not named"."""
    captions = {(-1, -1): [""]}
    for a, artist in enumerate(data.artists):
        captions[a, -1] = [shape.format(artist=artist) for shape in ARTIST_ONLY]
        for t, names in enumerate(data.synonyms):
            captions[a, t] = [shape.format(artist=artist, thing=name) for name in names for shape in BOTH]
    for t, names in enumerate(data.synonyms):
        captions[-1, t] = [shape.format(thing=name) for name in names for shape in THING_ONLY]
    return captions


def draw_caption(captions: dict, artist: int, thing: int, rng: random.Random) -> str:
    """One wording: 10 % empty (so that guidance works), 5 % without artist, 2 % without thing, else both.

    A thing's own name is drawn half of the time, its other names share the rest. For a thing without a name
    (-1): 15 % empty, else the artist alone.
    """
    chance = rng.random()
    if chance < 0.10:
        return ""
    key = (-1, thing) if chance < 0.15 else (artist, -1) if chance < 0.17 else (artist, thing)
    wordings = captions[key]
    shapes = len(BOTH) if -1 not in key else len(THING_ONLY)
    if key[1] >= 0 and rng.random() < 0.5:
        wordings = wordings[:shapes]  # the first name's shapes come first
    return rng.choice(wordings)
