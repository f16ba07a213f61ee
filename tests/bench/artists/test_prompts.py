"""The committed prompt sets say what their README says; no pipeline is loaded."""

import csv
import re
from collections import Counter
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import pytest

from more_hf.data import EMOJI_ARTISTS


REPO = Path(__file__).parents[3]
RECIPE = REPO / "benchmarks" / "emoji_sd"
COLUMNS = ["case_number", "prompt", "evaluation_seed", "artist", "thing", "group"]
FILES = ("emoji10", "emoji10_validation", "artists10", "emoji108")
EMOJI_GROUPS = {
    "emoji-a": {"Twemoji", "Fluent", "Microsoft Flat", "High Contrast", "Firefox OS"},
    "emoji-b": {"Noto", "Blobmoji", "EmojiOne", "Monotone", "Streamline"},
}
PAINTER_GROUPS = {
    "big": {"Van Gogh", "Pablo Picasso", "Rembrandt", "Andy Warhol", "Caravaggio"},
    "niche": {"Kelly McKernan", "Thomas Kinkade", "Tyler Edlin", "Kilian Eng", "Ajin: Demi Human"},
}
GROUPS = {
    **dict.fromkeys(("emoji10", "emoji10_validation", "emoji108"), EMOJI_GROUPS),
    "artists10": PAINTER_GROUPS,
}
# What must stand in a prompt: an emoji artist's whole name, a painter's surname.
SURNAMES = {artist: artist for artist in EMOJI_ARTISTS}
SURNAMES |= {name: name.split()[-1] for group in PAINTER_GROUPS.values() for name in group}
SURNAMES |= {"Van Gogh": "Van Gogh", "Ajin: Demi Human": "Ajin"}


def rows_of(name):
    with open(REPO / "prompts" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def known_things():
    return {line.replace("-", " ") for line in (RECIPE / "things.txt").read_text().split()}


def names(surname, prompt):
    return re.search(rf"\b{re.escape(surname)}\b", prompt, re.IGNORECASE) is not None


def wording(row):
    """The prompt with its names taken out, the artist's first: a thing's name is part of no artist's."""
    prompt = row["prompt"].replace(row["artist"], "{artist}") if row["artist"] else row["prompt"]
    return prompt.replace(row["thing"], "{thing}")


@pytest.mark.parametrize("name", FILES)
def test_schema(name):
    rows = rows_of(name)
    for n, row in enumerate(rows):
        assert list(row) == COLUMNS
        assert row["case_number"] == str(n)
        assert 0 < int(row["evaluation_seed"]) < 2**31
        assert row["thing"].lower() in row["prompt"].lower()
        assert not re.match(r"(an?|the)\b", row["thing"], re.IGNORECASE)
    assert len({row["prompt"].lower() for row in rows}) == len(rows)


@pytest.mark.parametrize(("name", "each"), [("emoji10", 20), ("emoji10_validation", 10), ("artists10", 20)])
def test_counts_and_groups(name, each):
    rows = rows_of(name)
    expected = {artist: group for group, artists in GROUPS[name].items() for artist in artists}
    assert Counter(row["artist"] for row in rows) == {**dict.fromkeys(expected, each), "": 20}
    for row in rows:
        assert row["group"] == expected.get(row["artist"], "")


def test_seeds_are_far_apart():
    files = (*FILES, "emoji_levels")  # which has tests of its own, `test_levels.py`
    seeds = sorted(int(row["evaluation_seed"]) for name in files for row in rows_of(name))
    assert len(seeds) == 560 + 648 + 984
    assert min(b - a for a, b in pairwise(seeds)) >= 50


@pytest.mark.parametrize("name", FILES)
def test_each_prompt_names_its_artist_and_no_other(name):
    artists = [artist for group in GROUPS[name].values() for artist in group]
    for row in rows_of(name):
        named = {artist for artist in artists if names(SURNAMES[artist], row["prompt"])}
        assert named == ({row["artist"]} if row["artist"] else set()), row["prompt"]
        assert not any(names(surname, row["thing"]) for surname in SURNAMES.values())


@pytest.mark.parametrize(
    ("name", "count", "per_artist", "per_thing"),
    [("emoji10", 5, {4}, {2}), ("emoji10_validation", 4, {2, 3}, {1, 2})],
)
def test_emoji_things_and_wordings_are_those_of_training_and_balanced(name, count, per_artist, per_thing):
    rows, recipe = [row for row in rows_of(name) if row["artist"]], (RECIPE / "dataset.py").read_text()
    assert {row["thing"] for row in rows} <= known_things()
    wordings = {wording(row) for row in rows}
    assert len(wordings) == count
    assert all(f'"{w}"' in recipe for w in wordings)
    for key, allowed in (("artist", per_artist), ("thing", per_thing)):
        counted = Counter((row[key], wording(row)) for row in rows)
        assert {counted[value, w] for value in {row[key] for row in rows} for w in wordings} == allowed


def test_many_things_have_six_prompts_that_nothing_else_has():
    rows, recipe = rows_of("emoji108"), (RECIPE / "dataset.py").read_text()
    assert Counter(row["thing"] for row in rows) == dict.fromkeys(known_things(), 6)
    shapes = {(row["thing"], wording(row).replace("an {thing}", "a {thing}")) for row in rows}
    assert len(shapes) == len(rows)
    assert all(f'"{shape}"' in recipe for _, shape in shapes)
    assert min(Counter(row["artist"] for row in rows).values()) >= 60
    others = {row["prompt"] for name in ("emoji10", "emoji10_validation") for row in rows_of(name)}
    others |= set((REPO / "more_hf" / "data" / "emoji_prompts.txt").read_text().splitlines())
    assert not others & {row["prompt"] for row in rows}


def test_validation_shares_nothing_with_test():
    test, validation = rows_of("emoji10"), rows_of("emoji10_validation")
    keys = (wording, *map(itemgetter, ("prompt", "thing", "evaluation_seed")))
    assert not any({value(row) for row in test} & {value(row) for row in validation} for value in keys)
