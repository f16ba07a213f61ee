"""Measure the solvers and tokens that `auto` tries, on lists of artists and things.

    python benchmarks/artists/many/order/order.py            # draws what rows.csv lacks, and the tables
    python benchmarks/artists/many/order/order.py --tables   # the tables alone

Two lists a size: the order was chosen on the first, and is reported on the second. Wordings and seeds are of
no other file. Every list sends its things to six others and its artists to two others. A row of rows.csv is
a picture; `forgotten` says whether the forgotten name is recognized in it, `target` whether the name that it
was sent to is, and `kept` whether everything else that the prompt asks for is.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

import more_hf
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.diffusion.encoder import TOKENS, Encoder, column
from more_hf.diffusion.erasure import ConceptErasure
from more_hf.diffusion.prompts import TEMPLATES
from more_hf_bench.artists.config import ARTISTS, THINGS
from more_hf_bench.artists.generate import generate
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import PromptRow, read_prompts, spread
from more_hf_bench.artists.run import EMOJI
from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
SIZES = {5: 2, 12: 4, 20: 4, 40: 5, 70: 5}  # names on a list -> how many of them are artists
LISTS = ("chosen on", "reported on")
NUM_TARGETS = {ARTISTS: 2, THINGS: 6}
PICTURES = 20, 16  # of forgotten names, and of prompts without one
WORDINGS = ("an emoji of a {} in {}'s style", "a {}, drawn by {}", "a drawing of a {} by {}")
SEED_STEP = 9_000_000
ORIGINAL = "original, asked for the target"
SETTINGS = {
    ORIGINAL: {},
    "exact, positions": {"solver": "covariance", "tokens": "positions"},
    "exact, last+end": {"solver": "covariance", "tokens": "last+end"},
    "soft, positions": {"solver": "soft", "tokens": "positions"},
    "soft, last+end": {"solver": "soft", "tokens": "last+end"},
    "soft 0.2, positions": {"solver": "soft", "tokens": "positions", "softness": 0.2},
}
LARGEST = {"exact, positions": 20}  # there, this already moves ordinary prompts by 30 %
PAIRS = (
    ("soft, positions", "soft, last+end"),
    ("soft, positions", "soft 0.2, positions"),
    ("soft, last+end", "exact, last+end"),
    ("exact, positions", "exact, last+end"),
)
CELL = ["size", "list", "setting"]
JUDGED = ["forgotten", "target", "kept"]
FIGURES = ["ordinary_moved", "way_left", "prompts_left"]
COLUMNS = [*CELL, "name", *JUDGED, *FIGURES]
WARNED = "ordinary_moved"  # the figure behind the warning
EDGES = [0, 0.09, 0.12, 0.15, 0.2, 0.25, 0.3, 0.5]


@dataclass(frozen=True)
class List:
    """Names to forget, each with its target, and the rows to draw, those of forgotten names first."""

    targets: dict[str, str]
    rows: list[PromptRow]

    def sent(self, row: PromptRow) -> PromptRow:
        """The row with the target in place of the forgotten name."""
        thing, artist = (self.targets.get(name, name) for name in (row.thing, row.artist))
        return replace(row, thing=thing, artist=artist)


def draw_list(size: int, which: str) -> List:
    """Artists and things in random order, and prompts in each of which one of them occurs, or none."""
    seed = f"{size} {which}"
    targets: dict[str, str] = {}
    by_kind = {ARTISTS: SIZES[size], THINGS: size - SIZES[size]}
    for kind, count in by_kind.items():
        names = sorted(read_prompts("emoji108", kind).names)
        random.Random(seed).shuffle(names)
        goals = names[count : count + NUM_TARGETS[kind]]
        targets |= {name: goals[i % len(goals)] for i, name in enumerate(names[:count])}

    rows = []
    for kind in by_kind:
        prompts = read_prompts("emoji108", kind)
        alone = [row for row in prompts.rows if len(targets.keys() & {row.thing, row.artist}) == 1]
        own = [name for name in targets if name in prompts.names]
        rows += spread(replace(prompts, rows=tuple(alone)), own, PICTURES[0] // len(by_kind), seed)
    others = [row for row in prompts.rows if targets.keys().isdisjoint({row.thing, row.artist})]
    rows += random.Random(seed).sample(others, PICTURES[1])
    return List(targets, rows)


def prompt_of(row: PromptRow) -> str:
    """What is drawn for a row."""
    return WORDINGS[row.case_number % len(WORDINGS)].format(row.thing, row.artist)


def measure(size: int, which: str, setting: str, judges: EmojiJudges) -> Iterator[dict]:
    """Yield a row for each picture of a list with a setting."""
    own, cell = draw_list(size, which), dict(zip(CELL, (size, which, setting), strict=True))
    pipe = more_hf.load_emoji_sd()
    pipe.set_progress_bar_config(disable=True)
    sent = [own.sent(row) for row in own.rows]
    facts, figures = {}, dict.fromkeys(own.targets, {})
    if setting != ORIGINAL:
        more_hf.erase_concept(pipe, list(own.targets), remap_to=own.targets, **SETTINGS[setting])
        erasure = more_hf.get_erasure(pipe)
        facts = {"ordinary_moved": erasure.guarantees["ordinary_moved"]}
        figures = {name: figures_of(erasure, pipe, name, target) for name, target in own.targets.items()}
    drawn = sent if setting == ORIGINAL else own.rows
    images = generate(
        pipe,
        [prompt_of(row) for row in drawn],
        [row.evaluation_seed + SEED_STEP for row in drawn],
        steps=EMOJI["steps"],
        guidance=EMOJI["guidance"],
        batch_size=18,
    )
    artists, things = judges.judge(images, own.rows)
    targets = judges.judge(images, sent)[1]
    for row, to, artist, thing, target in zip(own.rows, sent, artists, things, targets, strict=True):
        if row.thing in own.targets:
            seen = {"name": row.thing, "forgotten": thing, "target": target, "kept": artist == row.artist}
        elif row.artist in own.targets:
            forgotten, target = artist == row.artist, artist == to.artist
            seen = {"name": row.artist, "forgotten": forgotten, "target": target, "kept": thing}
        else:
            seen = {"kept": thing and artist == row.artist}
        judged = {key: int(value) if key != "name" else value for key, value in seen.items()}
        yield {**cell, **judged, **facts, **figures.get(seen.get("name"), {})}


def figures_of(erasure: ConceptErasure, pipe, name: str, target: str) -> dict[str, float]:
    """
    How far a name stops short of its target: the worst of its prototypes, and the mean over the end tokens of
    single prompts; as shares of the way.
    """
    remap, encoder = erasure.remap, Encoder(pipe)
    P = remap.prototypes
    left = []
    for kind in TOKENS["positions"]:
        if column(name, kind) in P.names:
            start, goal = P[column(name, kind)], P[column(target, kind)]
            left.append(float((remap.apply(start) - goal).norm() / (start - goal).norm()))
    prompts = [template.format(word) for word in (name, target) for template in TEMPLATES]
    ends = [z[encoder.layout(prompt).end] for prompt, z in zip(prompts, encoder.encode(prompts), strict=True)]
    starts, goals = torch.stack(ends).double().chunk(2)
    ways = (remap.apply(starts) - goals).norm(dim=1) / (starts - goals).norm(dim=1)
    return {"way_left": max(left), "prompts_left": float(ways.mean())}


def write_tables(rows: pd.DataFrame) -> None:
    """Write table.md from the rows: what each setting gives, and which figure tells good from bad."""
    parts = []
    for which in LISTS:
        own = rows[rows["list"] == which]
        percent = (100 * own.groupby(["setting", "size"], sort=False)[JUDGED].mean()).round()
        lines = []
        for setting in SETTINGS:
            line = {"setting": setting}
            for size in SIZES:
                found = percent.loc[(setting, size)] if (setting, size) in percent.index else []
                line[f"{size} names"] = " / ".join(f"{share:.0f}" for share in found)
            lines.append(line)
        parts += [f"## {' / '.join(JUDGED)}, in percent: the lists {which}", markdown_table(lines)]

    parts += [
        "## The same pictures with one setting less with another, in points",
        markdown_table(paired(rows)),
    ]
    sent = rows[rows["target"].notna() & rows["way_left"].notna()]
    separated = []
    for figure in FIGURES:
        line = {"figure": figure}
        for which in LISTS:
            own = sent[sent["list"] == which]
            line[f"AUC, lists {which}"] = round(1 - roc_auc_score(own["target"], own[figure]), 2)
        separated.append(line)
    parts += ["## How well a figure tells where the target is recognized", markdown_table(separated)]

    lines = []
    for interval, own in sent.groupby(pd.cut(sent[WARNED], EDGES), observed=True):
        line = {WARNED: f"{interval.left:g} to {interval.right:g}", "pictures": len(own)}
        lines.append({**line, **(100 * own[JUDGED].mean()).round().astype(int).to_dict()})
    parts += [f"## By `{WARNED}`, all lists, in percent", markdown_table(lines)]
    write_text(HERE / "table.md", "\n\n".join(parts) + "\n")


def paired(rows: pd.DataFrame) -> list[dict[str, object]]:
    """The mean difference between two settings over the same prompts and seeds, with twice its error."""
    rows = rows.assign(picture=rows.groupby(CELL).cumcount())
    lines = []
    for (one, other), which in itertools.product(PAIRS, LISTS):
        own = rows[rows["list"] == which].set_index(["size", "picture"])
        apart = own[own["setting"] == one][JUDGED] - own[own["setting"] == other][JUDGED]
        for label, part in (("up to 20 names", apart.loc[:20]), ("40 and 70 names", apart.loc[40:])):
            line = {"setting": one, "less": other, "lists": which, "names": label}
            for judged in JUDGED:
                found = 100 * part[judged].dropna()
                line[judged] = f"{found.mean():+.0f} ± {2 * found.sem():.0f}" if len(found) else ""
            lines.append(line)
    return lines


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tables", action="store_true", help="write the tables again, and draw nothing")
    path = HERE / "rows.csv"
    if not parser.parse_args().tables:
        judges = EmojiJudges()
        for which in LISTS:
            for size, setting in itertools.product(SIZES, SETTINGS):
                if size <= LARGEST.get(setting, size):
                    done = pd.read_csv(path)[CELL].to_numpy().tolist() if path.is_file() else []
                    if [size, which, setting] not in done:
                        rows = pd.DataFrame(measure(size, which, setting, judges), columns=COLUMNS)
                        rows.to_csv(path, mode="a", header=not done, index=False, float_format="%.4g")
    write_tables(pd.read_csv(path))


if __name__ == "__main__":
    main()
