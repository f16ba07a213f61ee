"""Choose targets and defaults on the validation prompts.

    python benchmarks/artists/choose.py targets     # every artist sent to every other
    python benchmarks/artists/choose.py defaults    # one factor at a time from a centre, then crossed

`targets` writes targets_validation.csv and prompts/targets*.csv, `defaults` writes defaults.csv and
defaults.md; pictures go to tuning/. Run again to resume: a line that is there is not measured again. The
test prompts are not touched.

An erasure is scored on pictures of the forgotten artist, of the nine others and without an artist, by LPIPS
and by the judges. `score` is what is maximised: style removed + content kept (forgotten artist) + style and
content kept (others), each in percent of what the original has, less 100 × lpips_r.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pandas as pd

import more_hf
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.core.request import ConceptRequest
from more_hf.data import EMOJI_ARTISTS
from more_hf.diffusion.erase import erase
from more_hf.diffusion.prompts import TEMPLATES, everyday_prompts, packaged_prompts
from more_hf_bench.artists.config import Erasure
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import read_prompts, read_targets
from more_hf_bench.artists.rows import measured
from more_hf_bench.artists.run import EMOJI, Method, run_artists
from more_hf_bench.columns import read_cells, read_rows
from more_hf_bench.script import Point, argument_parser, search


HERE = Path(__file__).parent
STYLES = ("High Contrast", "Streamline", "Fluent", "Blobmoji")  # black and white, line drawing, 3D, flat
PROMPTS = "emoji10_validation"
VISIBLE = 0.15  # LPIPS between what two artists draw, below which a person hardly sees a difference
NEAR = 5  # points of the score, less than one picture of ten
SEVERAL = 3  # targets of the methods that take several
# Erased in one call; they share a target.
JOINT = (
    "Twemoji+Noto+Blobmoji",
    "Twemoji+Noto+Blobmoji+Fluent+Microsoft Flat",
    "Fluent+Microsoft Flat+High Contrast",
    "EmojiOne+Monotone+Firefox OS",
    "High Contrast+EmojiOne+Monotone+Firefox OS+Streamline",
)
THINGS = ("cat face", "red heart", "house", "rocket", "sunflower", "guitar", "pizza", "fish")
BARE = ("{}", "{} style")  # positions need a token after the name
SCENES = ("photo", "table", "rain", "next to")
STYLE_TEMPLATES = tuple(t for t in TEMPLATES if not any(scene in t for scene in SCENES))

CROSSED = "the best two"
SHOWN = ("style_f", "content_f", "style_r", "content_r", "lpips_f", "lpips_r", "lpips_none", "score")

# Name to what differs from the centre: fields of `ConceptRequest`, `sigma` (which prompts are behind Σ: the
# general ones, or one of N) and `targets` (how many).
CENTRE = {"solver": "covariance", "tokens": "positions"}
FACTORS = {
    "centre": {},
    **{f"tokens={tokens}": {"tokens": tokens} for tokens in ("last", "subject", "end", "subject+end")},
    "solver=pinv": {"solver": "pinv"},
    "solver=pinv retain=artists": {"solver": "pinv", "retain": "artists"},
    "solver=pinv retain=artists+things": {"solver": "pinv", "retain": "artists+things"},
    **{f"retain={names} (in Σ)": {"retain": names} for names in ("artists", "things")},
    **{f"shrinkage={part}": {"shrinkage": float(part)} for part in ("1e-6", "1e-5", "1e-3", "1e-2")},
    "templates=two": {"templates": BARE},
    "templates=styles": {"templates": STYLE_TEMPLATES},
    "sigma=general": {"sigma": "general"},
    **{f"sigma=1 of {n}": {"sigma": n} for n in (4, 12)},
    **{f"targets={n}": {"targets": n} for n in (2, 3, 9)},
    "remap_to=None": {"targets": 0},
    **{f"targets=3 router={name}": {"targets": 3, "router": name} for name in ("random", "hash")},
}


def erasure_of(forget: str, others: int, **names: list[str]) -> Erasure:
    """
    One artist, on the validation prompts: all of that artist, the first `others` of each other, and `others`
    times three without one.
    """
    seen: Counter[str] = Counter()
    cases = []
    for row in read_prompts(PROMPTS).rows:
        seen[row.artist] += 1
        most = others if row.artist else 3 * others
        if row.artist == forget or seen[row.artist] <= most:
            cases.append(row.case_number)
    return Erasure(**{"remap_to": None, "several": None, "retain": [], **names}, cases=cases)


def measure(functions: Mapping[str, Method], erasures: Mapping[str, Erasure], name: str) -> list[dict]:
    """Draw what every function makes of the erasures; a line for each, over the pictures of all erasures."""
    output = HERE / "tuning" / name
    pipe, judges = more_hf.load_emoji_sd(), EmojiJudges()
    options = {"remap_to": None, "output": output, "judges": judges, "batch_size": 32, **EMOJI}
    run_artists(pipe, functions, PROMPTS, erasures, **options)
    rows = measured(read_rows(output / "rows.csv"))
    rows = rows[rows["forget"].isin(erasures)]
    return [summary(rows[rows["method"] == function]) for function in functions]


def summary(rows: pd.DataFrame) -> dict[str, float]:
    """The mean of each column, the score, and the number of pictures; of one artist's erasures."""
    columns = ["lpips", "content_before", "content_after", "style_before", "style_after"]
    named = rows["artist"] != ""
    groups = {"f": rows["is_forgotten"], "r": named & ~rows["is_forgotten"], "none": ~named}
    line = {}
    for group, mask in groups.items():
        # A prompt without an artist asks for no style.
        asked = columns[:3] if group == "none" else columns
        for column, mean in rows.loc[mask, asked].mean().items():
            judged, _, when = column.partition("_")
            line[f"{judged}_{group}" + ("_before" if when == "before" else "")] = round(mean, 4)
    removed = 1 - line["style_f"] / max(line["style_f_before"], 10.0)
    kept = sum(
        min(1.0, line[name] / max(line[f"{name}_before"], 1e-9))
        for name in ("content_f", "style_r", "content_r")
    )
    line["score"] = round(100 * (removed + kept) - 100 * line["lpips_r"], 3)
    line["n"] = len(rows)
    line["seconds_prepare"] = round(rows["seconds_prepare"].mean(), 2)
    return line


def best_targets(lines: list[dict[str, str]], forgotten: list[str]) -> list[str]:
    """
    The target, then the further ones where several are taken.

    The target is, among those that differ visibly and score less than a picture of ten below the best, the
    one that changes pictures least; the further ones are the next best by score. Of several forgotten artists
    the mean counts, and none of them can be a target.
    """
    own = [line for line in lines if line["forget"] in forgotten]
    possible = [artist for artist in EMOJI_ARTISTS if artist not in forgotten]

    def mean(column: str, target: str) -> float:
        return sum(float(line[column]) for line in own if line["remap_to"] == target) / len(forgotten)

    score = {target: mean("score", target) for target in possible}
    lpips = {target: mean("lpips_f", target) for target in possible}
    visible = sorted(
        (target for target in possible if lpips[target] >= VISIBLE), key=lambda target: -score[target]
    )
    near = [target for target in visible if score[target] > score[visible[0]] - NEAR]
    first = min(near, key=lambda target: lpips[target])
    return [first, *(target for target in visible if target != first)][:SEVERAL]


def choose_targets() -> None:
    points = [
        {"forget": forget, "remap_to": target}
        for forget in EMOJI_ARTISTS
        for target in EMOJI_ARTISTS
        if target != forget
    ]
    lines = search(HERE / "targets_validation.csv", points, measure_targets)
    best = {forget: best_targets(lines, forget.split("+")) for forget in (*EMOJI_ARTISTS, *JOINT)}
    write_table("targets", {forget: targets[:1] for forget, targets in best.items()})
    write_table("targets_several", best)


def measure_targets(points: Sequence[Point]) -> Iterator[dict]:
    """Send one artist after the other to its targets."""

    def erase_to(target, pipe, concepts, *, remap_to, retain):
        return more_hf.erase_concept(pipe, concepts, remap_to=[target], solver="covariance")

    for forget, own in groupby(points, itemgetter("forget")):
        functions = {f"to {point['remap_to']}": partial(erase_to, point["remap_to"]) for point in own}
        yield from measure(functions, {forget: erasure_of(forget, 1)}, "targets")


def write_table(name: str, best: dict[str, list[str]]) -> None:
    """Write the packaged table with these lines first, and those of other artists after them."""
    others = {forget: targets for forget, targets in read_targets(name).items() if forget not in best}
    lines = [f"{forget},{'; '.join(targets)}" for forget, targets in {**best, **others}.items()]
    write_text(HERE.parents[1] / "prompts" / f"{name}.csv", "\n".join(["forget,remap_to", *lines]) + "\n")


def request_for(forget: str, ranked: list[str], factors: dict, tokenizer) -> ConceptRequest:
    """What a cell asks for; `ranked` are the targets, the best first."""
    options = {**CENTRE, **factors}
    names = {"artists": [artist for artist in EMOJI_ARTISTS if artist != forget], "things": list(THINGS)}
    names["artists+things"] = names["artists"] + names["things"]
    retain = names.get(options.pop("retain", None), [])
    remap_to = ranked[: options.pop("targets", 1)] or None
    sigma = options.pop("sigma", 1)
    if sigma == "general":
        everyday = packaged_prompts("everyday_prompts.txt")
    else:
        everyday = everyday_prompts(tokenizer)[::sigma]
    return ConceptRequest.of(forget, remap_to=remap_to, retain=retain, everyday=everyday, **options)


def best_two(lines: list[dict[str, str]]) -> list[str]:
    """
    The best cells that set different arguments, the centre left out: with both at once they are crossed.
    """
    singles = sorted(
        (line for line in lines if FACTORS.get(line["cell"])), key=lambda line: -float(line["score"])
    )
    first = singles[0]["cell"]
    others = [line["cell"] for line in singles if not FACTORS[first].keys() & FACTORS[line["cell"]].keys()]
    return [first, others[0]]


def choose_defaults(cells: list[str]) -> None:
    path = HERE / "defaults.csv"
    singles = [{"cell": cell} for cell in cells or FACTORS if cell != CROSSED]
    if singles:
        search(path, singles, measure_defaults)
    if not cells or CROSSED in cells:
        search(path, [{"cell": " + ".join(best_two(read_cells(path)))}], measure_defaults)
    lines = [
        {"cell": line["cell"], **{column: float(line[column]) for column in SHOWN}}
        for line in read_cells(path)
    ]
    write_text(HERE / "defaults.md", markdown_table(lines) + "\n")


def measure_defaults(points: Sequence[Point]) -> list[dict]:
    """Erase four styles with the factors of each cell; a crossed one has those of its parts."""
    targets = {forget: names[0] for forget, names in read_targets("targets").items()}
    order = sorted(read_cells(HERE / "targets_validation.csv"), key=lambda line: -float(line["score"]))

    def erase_with(factors, pipe, concepts, *, remap_to, retain):
        (forget,) = concepts
        scored = [line["remap_to"] for line in order if line["forget"] == forget]
        ranked = list(dict.fromkeys([targets[forget], *scored]))
        erase(pipe, request_for(forget, ranked, factors, pipe.tokenizer))
        return pipe

    functions = {}
    for point in points:
        factors: dict = {}
        for part in point["cell"].split(" + "):
            factors |= FACTORS[part]
        functions[point["cell"]] = partial(erase_with, factors)
    return measure(functions, {forget: erasure_of(forget, 2) for forget in STYLES}, "defaults")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("what", choices=("targets", "defaults"))
    parser.add_argument(
        "--cells", nargs="+", default=[], choices=[*FACTORS, CROSSED], help="only these cells of the defaults"
    )
    args = parser.parse_args()
    if args.what == "targets":
        choose_targets()
    else:
        choose_defaults(args.cells)


if __name__ == "__main__":
    main()
