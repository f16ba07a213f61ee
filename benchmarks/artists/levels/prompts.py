"""Write the prompts that ask for the same artist in other words.

    python benchmarks/artists/levels/prompts.py

Every artist is asked for the same twelve things at each level: by name, as a possessive, in misspellings, in
short and in long descriptions. Of the last three some were held out of the embedded pipeline's training
(`variant`, ...), and some were not (`variant-trained`, ...). The level `near` names no artist: its things are
described in words that descriptions of the three forgotten artists have, too.
"""

import json
import random
import re
from pathlib import Path

import pandas as pd

from more_hf.data import FOLDER
from more_hf.diffusion.prompts import packaged_prompts
from more_hf_bench.artists.prompts import read_prompts
from more_hf_bench.columns import write_rows


ROOT = Path(__file__).parents[3]
FORGOTTEN = ("High Contrast", "Streamline", "Blobmoji")
# Drawn by all ten artists, in neither emoji10 nor emoji10_validation, and an "a" stands before each.
THINGS = (
    "broken heart", "christmas tree", "cloud", "cookie", "crescent moon", "dog face", "fox", "graduation cap",
    "hibiscus", "high heeled shoe", "horse face", "lady beetle", "lipstick", "money bag", "monkey face",
    "peach", "pig face", "radio", "rainbow", "red apple", "skull", "telescope", "tomato", "tractor",
)  # fmt: skip
EACH = 12  # things of an artist
NAMED = (
    "a {thing} in the style of {artist}",
    "an emoji of a {thing} by {artist}",
    "{artist} {thing}",
    "a picture of a {thing}, drawn by {artist}",
)
POSSESSIVE = ("{artist}'s drawing of a {thing}", "a {thing} in {artist}'s style")
DESCRIBED = (
    "a {thing}, {artist}",
    "{artist}, a {thing}",
    "{thing}, {artist}",
    "a picture of a {thing}, {artist}",
)
# Words that two descriptions share by chance.
COMMON = set("with that from each small part like made full filled into without".split())
NEAR = 24
FIRST_SEED, STEP = 2_000_003, 97  # beyond those of the other files, and further apart than seeds counted up


def main() -> None:
    groups = {row.artist: row.group for row in read_prompts("emoji10").rows if row.artist}
    words = json.loads((FOLDER / "emoji_descriptions.json").read_text())
    used = set(packaged_prompts("emoji_prompts.txt"))  # behind Σ
    for name in ("emoji10", "emoji10_validation", "emoji108"):
        used |= {row.prompt for row in read_prompts(name).rows}
    rows = []
    for i, artist in enumerate(groups):
        things = [THINGS[(2 * i + j) % len(THINGS)] for j in range(EACH)]
        for level, wordings, names in levels_of(artist, words["artists"][artist]):
            for j, thing in enumerate(things):
                # The j-th prompt takes the next name, and the next wording that no other file has used.
                said = names[(j + j // len(wordings)) % len(names)]
                turns = (wordings[(j + more) % len(wordings)] for more in range(len(wordings)))
                prompts = (wording.format(thing=thing, artist=said) for wording in turns)
                prompt = next(prompt for prompt in prompts if prompt not in used)
                rows.append((prompt, artist, thing, groups[artist], level))
    for thing, description in near(words):
        rows.append((description, "", thing, "", "near"))

    table = pd.DataFrame(rows, columns=["prompt", "artist", "thing", "group", "level"])
    table.insert(1, "evaluation_seed", FIRST_SEED + STEP * table.index)
    write_rows(ROOT / "prompts" / "emoji_levels.csv", table.rename_axis("case_number").reset_index())


def levels_of(artist: str, words: dict) -> list[tuple[str, tuple[str, ...], list[str]]]:
    """Each level with its wordings, and what they call the artist."""
    levels = [("name", NAMED, [artist]), ("alias", POSSESSIVE, [artist])]
    for kind, wordings in (("variant", NAMED), ("short", DESCRIBED), ("long", DESCRIBED)):
        levels.append((kind, wordings, words[kind]["held_out"]))
        levels.append((f"{kind}-trained", wordings, words[kind]["trained"]))
    return levels


def near(words: dict) -> list[tuple[str, str]]:
    """Things and descriptions of them that share a word with a description of a forgotten artist."""
    taken = set()
    for artist in FORGOTTEN:
        for kind in ("short", "long"):
            for part in words["artists"][artist][kind].values():
                taken |= content(" ".join(part))
    found = []
    for thing, descriptions in words["things"].items():
        shared = [d for part in descriptions.values() for d in part if content(d) & taken]
        found += [(thing.replace("-", " "), description) for description in shared[:1]]
    random.Random(0).shuffle(found)
    return found[:NEAR]


def content(text: str) -> set[str]:
    """Words of four letters and more, without those that say nothing."""
    return set(re.findall(r"[a-z]{4,}", text.lower())) - COMMON


if __name__ == "__main__":
    main()
