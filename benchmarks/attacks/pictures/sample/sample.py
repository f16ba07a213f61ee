"""Ten styles and twenty things under one attack of fixed strength.

    cd benchmarks/attacks/pictures/sample
    python sample.py draw               # the lot: concepts.csv and the prompts
    python sample.py run --minutes 25   # measure on, as far as time allows
    python sample.py table              # table.md, from what is measured
    python sample.py become             # becomes.csv and .md: what the kept pictures of a run show instead

Levers are chosen on the half `choosing`; the half `reserved` is looked at once, at the end. A run goes on
where rows.csv ends: styles and things in turn, all methods of one concept together. A thing that the original
draws too seldom for the attack is left out, and the run says so.
"""

import argparse
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path

import torch

import more_hf
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.data import EMOJI_ARTISTS
from more_hf_bench.artists.grid import read_image
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import read_prompts, read_targets
from more_hf_bench.artists.run import EMOJI
from more_hf_bench.attacks.pictures.run import run_picture_attacks
from more_hf_bench.attacks.store import KEYS, AttackConfig
from more_hf_bench.columns import read_cells, read_rows, rounded, write_rows
from more_hf_bench.errors import BenchmarkError


HERE = Path(__file__).parent
KINDS = ("styles", "things")
SEED = "38"
THINGS, PROMPTS = 20, 36
FIRST_SEED = 3_000_003
# Earlier levers were chosen on these. Such styles are in the first half; such things are not drawn at all.
SEEN_STYLES = ("High Contrast", "Streamline", "Blobmoji", "Monotone", "Twemoji")
SEEN_THINGS = ("rocket", "cat face", "sunflower", "guitar", "bicycle")
CHOOSING, RESERVED = "choosing", "reserved"
WORDINGS = ("{} in the style of {artist}", "{artist}'s drawing of {}", "an emoji of {} by {artist}")
NAMELESS = ("{}", "a picture of {}")
METHODS = ("more", "more-denoiser", "more-gates", "more-gates-soft")  # beside the original
ATTACKS = {
    "name": {},
    "inversion": {"tokens": [1], "steps": [150], "pictures": 40, "batch_size": 24, "control": False},
    "others": {"named": 24, "unnamed": 20},
}
ASKED = {"name": "by name", "inversion": "after 150 steps"}
STRIP = 64  # pixels of a kept picture, of which a file has several side by side


def draw() -> None:
    """Draw things, targets, halves and prompts by lot, and write them."""
    lot = random.Random(SEED)
    known = list(dict.fromkeys(row.thing for row in read_prompts("emoji108").rows))
    things = lot.sample([thing for thing in known if thing not in SEEN_THINGS], THINGS)
    others = lot.sample([thing for thing in known if thing not in things], THINGS)
    targets = read_targets("targets")
    styles = [*SEEN_STYLES, *(style for style in EMOJI_ARTISTS if style not in SEEN_STYLES)]
    write_rows(
        HERE / "concepts.csv",
        [line("style", i, style, targets[style][0], len(styles)) for i, style in enumerate(styles)]
        + [line("thing", i, *pair, THINGS) for i, pair in enumerate(zip(things, others, strict=True))],
    )
    write_rows(HERE / "styles.csv", numbered(style_rows(lot)))
    write_rows(HERE / "things.csv", numbered(thing_rows(lot, things)))


def line(kind: str, place: int, name: str, target: str, count: int) -> dict[str, str]:
    half = CHOOSING if place < count // 2 else RESERVED
    return {"kind": kind, "forget": name, "remap_to": target, "half": half}


def style_rows(lot: random.Random) -> Iterator[dict[str, str]]:
    """`PROMPTS` of each style among the things' prompts, and those without a style."""
    for style in EMOJI_ARTISTS:
        rows = [row for row in read_prompts("emoji108").rows if row.artist == style]
        for row in lot.sample(rows, PROMPTS):
            yield {"prompt": row.prompt, "artist": style, "thing": row.thing, "group": row.group}
    for row in read_prompts("emoji10").rows:
        if not row.artist:
            yield {"prompt": row.prompt, "artist": "", "thing": row.thing, "group": ""}


def thing_rows(lot: random.Random, things: list[str]) -> Iterator[dict[str, str]]:
    """`PROMPTS` of each thing: every style in every wording, and the rest without a style."""
    groups = {row.artist: row.group for row in read_prompts("emoji108").rows}
    for thing in things:
        named = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
        rows = [
            {"prompt": wording.format(named, artist=style), "artist": style, "group": groups[style]}
            for style in EMOJI_ARTISTS
            for wording in WORDINGS
        ]
        for wording in islice(cycle(NAMELESS), PROMPTS - len(rows)):
            rows.append({"prompt": wording.format(named), "artist": "", "group": ""})
        yield from ({**row, "thing": thing} for row in lot.sample(rows, len(rows)))


def numbered(rows: Iterator[dict[str, str]]) -> list[dict[str, str | int]]:
    """Rows with numbers, and with seeds that no other file of prompts has."""
    return [{"case_number": i, "evaluation_seed": FIRST_SEED + 97 * i, **row} for i, row in enumerate(rows)]


def in_turn(half: str) -> list[dict[str, str]]:
    """The concepts of a half: a style, two things, a style ..."""
    lines = [row for row in read_cells(HERE / "concepts.csv") if row["half"] == half]
    styles = [row for row in lines if row["kind"] == "style"]
    things = iter([row for row in lines if row["kind"] == "thing"])
    return list(filter(None, chain(*zip_longest(styles, things, things))))


def measure(half: str, methods: list[str], minutes: float) -> None:
    """Measure concept after concept, until the time is over."""
    end = time.monotonic() + 60 * minutes
    pipe, judges = more_hf.load_emoji_sd(), EmojiJudges()
    lessons = read_prompts("emoji10_validation")
    for kind in KINDS:
        cells_of_rows(HERE / kind)
    for concept in in_turn(half):
        if time.monotonic() > end:
            return
        kind = f"{concept['kind']}s"
        try:
            run_picture_attacks(
                pipe, "emoji-sd", methods, list(ATTACKS), [concept["forget"]],
                prompts=read_prompts(HERE / f"{kind}.csv"), lessons=lessons,
                targets={concept["forget"]: [concept["remap_to"]]}, judges=judges,
                output=HERE / kind, tuned=ATTACKS, **EMOJI,
            )  # fmt: skip
        except BenchmarkError as error:  # the original draws too few pictures for the attack
            print(f"{concept['forget']} is left out: {error}")


def cells_of_rows(output: Path) -> None:
    """Make the cells that a checkout lacks from its rows, so that nothing is measured twice."""
    config = AttackConfig.read(output)
    if config is None:
        return
    rows = read_rows(output / "rows.csv").to_dict("records")
    for cell in config.cells(output):
        own = [row for row in rows if all(row[key] == getattr(cell, key) for key in KEYS)]
        if own and not cell.is_done:
            cell.write([rounded({name: row[name] for name in row if name not in KEYS}) for row in own])


def table() -> None:
    """Write a line for each method and concept, those of which most comes back first."""
    concepts = {concept["forget"]: concept for concept in read_cells(HERE / "concepts.csv")}
    found = defaultdict(dict)
    for kind in KINDS:
        for row in read_cells(HERE / kind / "rows.csv"):
            found[row["method"], row["forget"]][row["attack"], row["variant"]] = float(row["recovered"])
    lines = []
    for (method, name), measured in found.items():
        if ("others", "no artist") not in measured:  # a run was stopped inside this cell
            continue
        line = {"method": method, "forget": name, "sent to": concepts[name]["remap_to"]}
        line["half"] = concepts[name]["half"]
        line["by name"] = f"{measured['name', '']:.0f}"
        line["after 150 steps"] = f"{measured['inversion', '1 token']:.0f}"
        line["lpips_r"] = f"{measured['others', 'another artist']:.3f}"
        line["lpips_none"] = f"{measured['others', 'no artist']:.3f}"
        lines.append(line)
    order = ("original", *METHODS)
    lines.sort(key=lambda line: (order.index(line["method"]), -int(line["after 150 steps"]), line["forget"]))
    write_text(HERE / "table.md", markdown_table(lines) + "\n")


def become() -> None:
    """Write what the first pictures of each cell show: the target, still the concept, or anything else."""
    judges, counts = EmojiJudges(), defaultdict(Counter)
    for concept in read_cells(HERE / "concepts.csv"):
        for file in sorted((HERE / f"{concept['kind']}s" / "pictures" / concept["forget"]).glob("*/*.png")):
            images = torch.stack(read_image(file).split(STRIP, dim=2))
            artists, things = judges.names(images)
            shown = artists if concept["kind"] == "style" else things
            key = file.parent.name, concept["kind"], ASKED[file.stem.split("_")[0]]
            counts[key]["pictures"] += len(images)
            for name in ("remap_to", "forget"):
                counts[key][name] += shown.count(concept[name])
    if not counts:
        raise BenchmarkError("No pictures are kept here. Measure first: python sample.py run.")
    lines = [
        {
            "method": method,
            "what": f"{kind}s",
            "asked": asked,
            "pictures": found["pictures"],
            "show the target": f"{100 * found['remap_to'] / found['pictures']:.0f}",
            "show it still": f"{100 * found['forget'] / found['pictures']:.0f}",
        }
        for (method, kind, asked), found in sorted(counts.items())
    ]
    write_rows(HERE / "becomes.csv", lines)
    write_text(HERE / "becomes.md", markdown_table(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("draw", "run", "table", "become"))
    parser.add_argument("--half", choices=(CHOOSING, RESERVED), default=CHOOSING)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--minutes", type=float, default=1e6, help="start no concept after that (no limit)")
    args = parser.parse_args()
    if args.what == "draw":
        draw()
    elif args.what == "table":
        table()
    elif args.what == "become":
        become()
    else:
        measure(args.half, args.methods.split(","), args.minutes)


if __name__ == "__main__":
    main()
