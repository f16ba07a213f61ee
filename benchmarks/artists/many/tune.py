"""Tune the published closed forms for many concepts at once, on prompts and sets that are not in the table.

    python benchmarks/artists/many/tune.py --output DIR    # resumes; DIR holds the pictures

Every method has a small grid around its published settings for one and for many concepts, at each size of
its own. Things are taken from the end of the order in which the table takes them, with other wordings and
seeds. The best cell is chosen among those in which what is forgotten is gone from seven of ten pictures
(all, if there is none): of the cells within 0.02 of the largest lpips_d, the one with the smallest lpips_r.
Writes tuning.csv, and the best cell of each method and size into settings-things.json and settings-
artists.json, for `tuned` in a file of `--config`.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import more_hf
from more_hf.core.files import write_json
from more_hf_bench.artists.config import ARTISTS, KINDS, THINGS, Kind
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import Prompts, read_prompts
from more_hf_bench.artists.run import EMOJI, run_artists
from more_hf_bench.columns import write_rows
from more_hf_bench.methods.registry import DIFFUSION
from more_hf_bench.script import argument_parser, grid, points_of


HERE = Path(__file__).parent
SIZES = {THINGS.name: (10, 40, 70), ARTISTS.name: (3, 5)}
TARGET = {THINGS.name: "emoji", ARTISTS.name: "Streamline"}  # one for all
PICTURES = (10, 10)
GONE, NEAR = 30.0, 0.02  # ten pictures tell no finer
WORDINGS = ("a {} by {}", "a {} in {}'s style", "{} by {}")
SEED_STEP = 5_000_000
# Published for a hundred people, and for one object; then what was tuned for one artist here.
OCE = (
    {"erase_scale": 800.0, "retain_scale": 2.0, "global_scale": 70.0, "lamb": 10.0},
    {"erase_scale": 2000.0, "retain_scale": 10.0, "global_scale": 0.0, "lamb": 10.0},
    {"erase_scale": 500.0, "retain_scale": 1.0, "global_scale": 100.0, "lamb": 10.0},
)
GRIDS = {
    "uce": grid(lamb=[5.0, 20.0, 100.0, 500.0]),
    "rece": grid(lamb=50.0, start_lamb=[50.0, 200.0, 1000.0]),
    "speed": grid(threshold=[1e-1, 1e-2, 1e-4], layers="v"),
    "oce": [{**scales, "layers": "v"} for scales in OCE],
    # The more names, the smaller is each direction's share of the energy, and the more must be raised.
    "cure": grid(alpha=[2.0, 20.0, 200.0, 2000.0], tokens="content")
    + grid(alpha=[2.0, 20.0], tokens="padded"),
}


def validation(kind: Kind) -> Prompts:
    """The names of emoji108 in the opposite order, with other wordings and seeds."""
    prompts = read_prompts("emoji108", kind)
    rows = []
    for number, row in enumerate(reversed(prompts.rows)):
        wording = WORDINGS[number % len(WORDINGS)]
        prompt, seed = wording.format(row.thing, row.artist), row.evaluation_seed + SEED_STEP
        rows.append(replace(row, case_number=number, prompt=prompt, evaluation_seed=seed))
    return replace(prompts, name="validation", sha256="", rows=tuple(rows))


def best_of(lines: list[dict]) -> dict:
    """As the docstring above says."""
    gone = KINDS[lines[0]["kind"]].gone
    removed = [line for line in lines if line[f"{gone}_f"] <= GONE] or lines
    largest = max(line["lpips_d"] for line in removed)
    near = [line for line in removed if line["lpips_d"] > largest - NEAR]
    return min(near, key=lambda line: line["lpips_r"])


def tune(kind: Kind, output: Path) -> list[dict]:
    points = {f"{point['method']} {json.dumps(point['settings'])}": point for point in points_of(GRIDS)}
    functions = {}
    for name, point in points.items():
        function = DIFFUSION[point["method"]].load()
        expand = {"expand": "object"} if point["method"] == "oce" and kind is THINGS else {}
        functions[name] = partial(function, **point["settings"], **expand)
    prompts = validation(kind)
    names = [name for name in prompts.names if name != TARGET[kind.name]]
    summary = run_artists(
        more_hf.load_emoji_sd(),
        functions,
        prompts,
        {f"{size} {kind.name}": names[:size] for size in SIZES[kind.name]},
        remap_to=TARGET[kind.name],
        output=output / kind.name,
        judges=EmojiJudges(),
        pictures=PICTURES,
        batch_size=20,
        **EMOJI,
    )
    columns = []
    for judged in ("style_f", "content_f", "style_r", "content_r"):
        columns += [f"{judged}_before", judged]
    lines = []
    for line in summary:
        point = points[line["method"]]
        key = {"kind": kind.name, "size": int(line["forget"].split()[0]), "method": point["method"]}
        key["settings"] = json.dumps(point["settings"])
        lines.append({**key, **{name: line[name] for name in (*columns, "lpips_f", "lpips_r", "lpips_d")}})
    return lines


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for pictures")
    args = parser.parse_args()
    lines = []
    for kind in (THINGS, ARTISTS):
        measured = tune(kind, args.output)
        lines += measured
        sizes: dict[str, dict] = {}
        for size in SIZES[kind.name]:
            for method in GRIDS:
                own = [line for line in measured if (line["size"], line["method"]) == (size, method)]
                best = best_of(own)
                sizes.setdefault(str(size), {})[method] = json.loads(best["settings"])
        write_json(HERE / f"settings-{kind.name}.json", {**single(kind), "sizes": sizes})
    write_rows(HERE / "tuning.csv", lines)


def single(kind: Kind) -> dict[str, dict]:
    """What was tuned for one artist, of these methods; things are expanded as things."""
    tuned = json.loads((HERE.parent / "settings.json").read_text("utf-8"))
    chosen = {method: tuned[method] for method in GRIDS}
    if kind is THINGS:
        chosen["oce"] = {**chosen["oce"], "expand": "object"}
    return chosen


if __name__ == "__main__":
    main()
