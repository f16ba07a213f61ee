"""The committed prompt sets say what their README says; no pipeline is loaded."""

import csv
import re
from collections import Counter
from itertools import combinations, pairwise
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
BLACK_AND_WHITE = {"High Contrast", "Monotone"}
# What must stand in a prompt: an emoji artist's whole name, a painter's surname.
SURNAMES = {
    **{artist: artist for artist in EMOJI_ARTISTS},
    "Van Gogh": "Van Gogh",
    "Pablo Picasso": "Picasso",
    "Rembrandt": "Rembrandt",
    "Andy Warhol": "Warhol",
    "Caravaggio": "Caravaggio",
    "Kelly McKernan": "McKernan",
    "Thomas Kinkade": "Kinkade",
    "Tyler Edlin": "Edlin",
    "Kilian Eng": "Eng",
    "Ajin: Demi Human": "Ajin",
}


def path_of(name):
    return REPO / "prompts" / f"{name}.csv"


def rows_of(name):
    with open(path_of(name), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names(surname, prompt):
    return re.search(rf"\b{re.escape(surname)}\b", prompt, re.IGNORECASE) is not None


def wording(row):
    """The prompt with its names taken out, the artist's first: a thing's name is part of no artist's."""
    prompt = row["prompt"].replace(row["artist"], "{artist}") if row["artist"] else row["prompt"]
    return prompt.replace(row["thing"], "{thing}")


@pytest.mark.parametrize("name", FILES)
def test_bytes_are_plain(name):
    raw = path_of(name).read_bytes()
    assert raw.isascii()
    assert b"\r" not in raw
    assert raw.endswith(b"\n")
    assert not raw.endswith(b"\n\n")


@pytest.mark.parametrize("name", FILES)
def test_schema(name):
    with open(path_of(name), newline="", encoding="utf-8") as file:
        header, *cells = csv.reader(file)
    assert header == COLUMNS
    assert {len(row) for row in cells} == {len(COLUMNS)}
    assert all(cell == " ".join(cell.split()) for row in cells for cell in row)
    for n, row in enumerate(rows_of(name)):
        assert row["case_number"] == str(n)
        assert row["evaluation_seed"].isdigit()
        assert 0 < int(row["evaluation_seed"]) < 2**31
        assert row["prompt"]
        assert row["thing"].lower() in row["prompt"].lower()
        assert not re.match(r"(an?|the)\b", row["thing"], re.IGNORECASE)
        assert len(row["thing"].split()) <= 10


@pytest.mark.parametrize(("name", "each"), [("emoji10", 20), ("emoji10_validation", 10), ("artists10", 20)])
def test_counts_and_groups(name, each):
    rows = rows_of(name)
    expected = {artist: group for group, artists in GROUPS[name].items() for artist in artists}
    assert Counter(row["artist"] for row in rows) == {**dict.fromkeys(expected, each), "": 20}
    for row in rows:
        assert row["group"] == expected.get(row["artist"], "")


def test_emoji_groups_have_black_and_white():
    assert set().union(*EMOJI_GROUPS.values()) == set(EMOJI_ARTISTS)
    for artists in EMOJI_GROUPS.values():
        assert len(artists) == 5
        assert len(artists & BLACK_AND_WHITE) == 1


@pytest.mark.parametrize("name", FILES)
def test_no_prompt_twice(name):
    prompts = [row["prompt"].lower() for row in rows_of(name)]
    assert len(set(prompts)) == len(prompts)


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


def test_prompts_without_an_artist_name_none_of_either_list():
    for name in FILES:
        for row in rows_of(name):
            if not row["artist"]:
                parts = {part for artist in SURNAMES for part in artist.replace(":", "").split()} - {
                    "High",
                    "Flat",
                    "Van",
                    "Human",
                }
                assert not any(names(part, row["prompt"]) for part in parts), row["prompt"]


@pytest.mark.parametrize("name", ["emoji10", "emoji10_validation"])
def test_emoji_things_are_known_to_the_pipeline(name):
    known = {line.replace("-", " ") for line in (RECIPE / "things.txt").read_text().split()}
    assert {row["thing"] for row in rows_of(name)} <= known


def test_every_emoji_artist_has_the_same_things():
    rows = rows_of("emoji10")
    things = {row["thing"] for row in rows}
    assert len(things) == 20
    for artist in [*EMOJI_ARTISTS, ""]:
        assert {row["thing"] for row in rows if row["artist"] == artist} == things


def test_validation_things_are_spread_evenly():
    rows = rows_of("emoji10_validation")
    of = {
        artist: {row["thing"] for row in rows if row["artist"] == artist} for artist in [*EMOJI_ARTISTS, ""]
    }
    assert len(of[""]) == 20
    assert {len(of[artist]) for artist in EMOJI_ARTISTS} == {10}
    assert Counter(thing for artist in EMOJI_ARTISTS for thing in of[artist]) == dict.fromkeys(of[""], 5)
    assert {len(of[a] & of[b]) for a, b in combinations(EMOJI_ARTISTS, 2)} <= {4, 5}


@pytest.mark.parametrize(
    ("name", "count", "per_artist", "per_thing"),
    [("emoji10", 5, {4}, {2}), ("emoji10_validation", 4, {2, 3}, {1, 2})],
)
def test_wordings_are_balanced(name, count, per_artist, per_thing):
    rows = [row for row in rows_of(name) if row["artist"]]
    wordings = {wording(row) for row in rows}
    assert len(wordings) == count
    assert any("{artist}'s" in w for w in wordings)
    assert any(w.index("{artist}") < w.index("{thing}") for w in wordings)
    assert any(w.endswith("{artist}") for w in wordings)
    for key, allowed in (("artist", per_artist), ("thing", per_thing)):
        counted = Counter((row[key], wording(row)) for row in rows)
        assert {counted[value, w] for value in {row[key] for row in rows} for w in wordings} == allowed


def test_emoji_wordings_are_those_of_training():
    source = (RECIPE / "dataset.py").read_text()
    for name in ("emoji10", "emoji10_validation"):
        for w in {wording(row) for row in rows_of(name)}:
            assert f'"{w}"' in source, w


def test_many_things_have_six_prompts_that_nothing_else_has():
    rows, recipe = rows_of("emoji108"), (RECIPE / "dataset.py").read_text()
    known = {line.replace("-", " ") for line in (RECIPE / "things.txt").read_text().split()}
    assert Counter(row["thing"] for row in rows) == dict.fromkeys(known, 6)
    shapes = {(row["thing"], wording(row).replace("an {thing}", "a {thing}")) for row in rows}
    assert len(shapes) == len(rows)
    assert all(f'"{shape}"' in recipe for _, shape in shapes)
    groups = {artist: group for group, artists in EMOJI_GROUPS.items() for artist in artists}
    assert all(row["group"] == groups[row["artist"]] for row in rows)
    assert min(Counter(row["artist"] for row in rows).values()) >= 60
    others = {row["prompt"] for name in ("emoji10", "emoji10_validation") for row in rows_of(name)}
    others |= set((REPO / "more_hf" / "data" / "emoji_prompts.txt").read_text().splitlines())
    assert not others & {row["prompt"] for row in rows}


def test_validation_shares_nothing_with_test():
    test, validation = rows_of("emoji10"), rows_of("emoji10_validation")
    for value in (
        wording,
        *(lambda row, key=key: row[key] for key in ("prompt", "thing", "evaluation_seed")),
    ):
        assert not {value(row) for row in test} & {value(row) for row in validation}


def test_painters_are_named_as_people_name_them():
    rows = rows_of("artists10")
    for group, least in (("big", 7), ("niche", 4)):
        for artist in PAINTER_GROUPS[group]:
            prompts = [row["prompt"].lower() for row in rows if row["artist"] == artist]
            possessive = sum(
                f"{artist.lower()}'s" in p or f"{SURNAMES[artist].lower()}'s" in p for p in prompts
            )
            full = sum(artist.lower() in p for p in prompts)
            assert least <= possessive <= 12, artist
            if artist in ("Pablo Picasso", "Andy Warhol"):
                assert 1 <= full <= 4, artist
            elif group == "niche":
                assert 15 <= full < 20, artist


def test_painters_prompts_have_no_common_form():
    rows = rows_of("artists10")
    for before, row in pairwise(rows):
        if row["artist"] == before["artist"] != "":
            forms = [
                re.sub(re.escape(r["thing"]), "", r["prompt"], flags=re.IGNORECASE) for r in (before, row)
            ]
            assert forms[0].lower() != forms[1].lower(), row["prompt"]
    assert len({row["thing"].lower() for row in rows}) == len(rows)
