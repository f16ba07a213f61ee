"""Choose targets and defaults on the validation prompts. Run again to resume: a line of a CSV that is there is not measured again.

    python benchmarks/artists/choose.py targets     # every artist sent to every other: targets_validation.csv, prompts/targets*.csv
    python benchmarks/artists/choose.py defaults    # one factor at a time from a centre, then crossed: defaults.csv

The test prompts are not touched. An erasure is scored on pictures of the forgotten artist, of the nine others and without an artist, by
LPIPS and by the judges; `score` is what is maximised: style removed + content kept (forgotten artist) + style and content kept (others),
each in percent of what the original has, less 100 × lpips_r.
"""

import argparse
import csv
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

import more_hf
from more_hf.bench.artists.images import generate, lpips_distance
from more_hf.bench.artists.judges import EmojiJudges
from more_hf.bench.artists.prompts import read_prompts, read_targets
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.core.remap import Remap
from more_hf.data import EMOJI_ARTISTS
from more_hf.diffusion import encoder as concepts
from more_hf.diffusion import plan as request


HERE = Path(__file__).parent
STYLES = ("High Contrast", "Streamline", "Fluent", "Blobmoji")  # black and white, line drawing, 3D, flat: the defaults are chosen on these
STEPS, GUIDANCE = 10, 4.0
VISIBLE = 0.15  # LPIPS between what two artists draw, below which a person hardly sees a difference
SEVERAL = 3  # targets of the methods that take several
JOINT = ("Twemoji+Noto+Blobmoji", "Twemoji+Noto+Blobmoji+Fluent+Microsoft Flat")  # erased in one call: they share a target
THINGS = ("cat face", "red heart", "house", "rocket", "sunflower", "guitar", "pizza", "fish")
BARE = ("{}", "{} style")  # positions need a token after the name
STYLE_TEMPLATES = tuple(t for t in concepts.TEMPLATES if "photo" not in t and "table" not in t and "rain" not in t and "next to" not in t)

CROSSED = "the best two"

# name -> what differs from the centre: arguments of erase_concept, and `shrinkage`, `templates`, `sigma` (prompts behind Σ), `targets`
CENTRE = {"solver": "covariance", "tokens": "positions"}
FACTORS = {
    "centre": {},
    "tokens=last": {"tokens": "last"},
    "tokens=subject": {"tokens": "subject"},
    "tokens=end": {"tokens": "end"},
    "tokens=subject+end": {"tokens": "subject+end"},
    "solver=pinv": {"solver": "pinv"},
    "solver=pinv retain=artists": {"solver": "pinv", "retain": "artists"},
    "solver=pinv retain=artists+things": {"solver": "pinv", "retain": "artists+things"},
    "retain=artists (in Σ)": {"retain": "artists"},
    "retain=things (in Σ)": {"retain": "things"},
    "shrinkage=1e-6": {"shrinkage": 1e-6},
    "shrinkage=1e-5": {"shrinkage": 1e-5},
    "shrinkage=1e-3": {"shrinkage": 1e-3},
    "shrinkage=1e-2": {"shrinkage": 1e-2},
    "templates=two": {"templates": BARE},
    "templates=styles": {"templates": STYLE_TEMPLATES},
    "sigma=general": {"sigma": "general"},
    "sigma=1 of 4": {"sigma": 4},
    "sigma=1 of 12": {"sigma": 12},
    "targets=2": {"targets": 2},
    "targets=3": {"targets": 3},
    "targets=9": {"targets": 9},
    "remap_to=None": {"targets": 0},
    "targets=3 router=random": {"targets": 3, "router": "random"},
    "targets=3 router=hash": {"targets": 3, "router": "hash"},
}


class Bench:
    """The validation pictures of the original, and what an erasure makes of them."""

    def __init__(self):
        self.pipe = more_hf.load_emoji_sd()
        self.pipe.set_progress_bar_config(disable=True)
        self.judges = EmojiJudges()
        self.rows = read_prompts("emoji10_validation").rows
        self.before = dict(zip([row.case_number for row in self.rows], self.draw(self.rows), strict=True))

    def draw(self, rows, pipe=None):
        asked = {"steps": STEPS, "guidance": GUIDANCE, "batch_size": 32}
        return generate(pipe or self.pipe, [row.prompt for row in rows], [row.evaluation_seed for row in rows], **asked)

    def chosen(self, forget: str, others: int) -> list:
        """All rows of the forgotten artist, the first `others` of each other artist, and `others` times three without one."""
        taken: dict[str, int] = {}
        rows = []
        for row in self.rows:
            taken[row.artist] = taken.get(row.artist, 0) + 1
            if row.artist == forget or taken[row.artist] <= (others if row.artist else 3 * others):
                rows.append(row)
        return rows

    def measure(self, forget: str, others: int, pipe=None) -> dict[str, list[float]]:
        """Measurements of the erased pipeline (`self.pipe`, or another one), picture by picture, so that cells of several styles can be
        pooled."""
        rows = self.chosen(forget, others)
        before, after = torch.stack([self.before[row.case_number] for row in rows]), self.draw(rows, pipe)
        distance = lpips_distance(before, after).tolist()
        (style_0, content_0), (style_1, content_1) = self.judges.judge(before, rows), self.judges.judge(after, rows)
        values: dict[str, list[float]] = {}
        for i, row in enumerate(rows):
            part = "f" if row.artist == forget else "r" if row.artist else "none"
            values.setdefault(f"lpips_{part}", []).append(distance[i])
            values.setdefault(f"content_{part}_before", []).append(100.0 * content_0[i])
            values.setdefault(f"content_{part}", []).append(100.0 * content_1[i])
            if part != "none":
                values.setdefault(f"style_{part}_before", []).append(100.0 * (style_0[i] == row.artist))
                values.setdefault(f"style_{part}", []).append(100.0 * (style_1[i] == row.artist))
        return values


def summary(values: dict[str, list[float]]) -> dict[str, float]:
    line = {name: round(sum(v) / len(v), 4) for name, v in values.items()}
    kept = lambda name: min(1.0, line[name] / max(line[f"{name}_before"], 1e-9))  # noqa: E731
    removed = 1 - line["style_f"] / max(line["style_f_before"], 10.0)
    line["score"] = round(100 * (removed + kept("content_f") + kept("style_r") + kept("content_r")) - 100 * line["lpips_r"], 3)
    line["n"] = len(values["lpips_f"]) + len(values["lpips_r"]) + len(values["lpips_none"])
    return line


def done(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []


def append(path: Path, line: dict) -> None:
    """One line, flushed, in the columns of the file: a kill loses at most the line being measured."""
    columns = list(done(path)[0]) if path.exists() else list(line)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(line)


def best_targets(lines: list[dict[str, str]], forgotten: list[str]) -> list[str]:
    """The target, then the further ones where several are taken.

    The target is, among those that differ visibly and score less than a picture of ten below the best, the one that changes pictures
    least; the further ones are the next best by score. Of several forgotten artists the mean counts, and none of them can be a target.
    """
    own = [line for line in lines if line["forget"] in forgotten]
    possible = [target for target in EMOJI_ARTISTS if target not in forgotten]
    score, lpips = (
        {target: sum(float(line[column]) for line in own if line["remap_to"] == target) / len(forgotten) for target in possible}
        for column in ("score", "lpips_f")
    )
    visible = sorted((target for target in score if lpips[target] >= VISIBLE), key=lambda target: -score[target])
    near = [target for target in visible if score[target] > score[visible[0]] - 5]
    first = min(near, key=lambda target: lpips[target])
    return [first, *(target for target in visible if target != first)][:SEVERAL]


def choose_targets() -> None:
    path = HERE / "targets_validation.csv"
    measured = {(line["forget"], line["remap_to"]) for line in done(path)}
    bench = None
    for forget in EMOJI_ARTISTS:
        for target in EMOJI_ARTISTS:
            if target == forget or (forget, target) in measured:
                continue
            bench = bench or Bench()
            more_hf.erase_concept(bench.pipe, forget, remap_to=[target], solver="covariance")
            append(path, {"forget": forget, "remap_to": target, **summary(bench.measure(forget, others=1))})
            more_hf.restore(bench.pipe)
    lines = done(path)
    best = {forget: best_targets(lines, forget.split("+")) for forget in (*EMOJI_ARTISTS, *JOINT)}
    write_table("targets", {forget: targets[:1] for forget, targets in best.items()})
    write_table("targets_several", best)


def write_table(name: str, best: dict[str, list[str]]) -> None:
    """The packaged table with these lines first, and those of other artists after them."""
    kept = {forget: targets for forget, targets in read_targets(name).items() if forget not in best}
    lines = [f"{forget},{'; '.join(targets)}" for forget, targets in {**best, **kept}.items()]
    write_text(HERE.parents[1] / "prompts" / f"{name}.csv", "\n".join(["forget,remap_to", *lines]) + "\n")


def erase(bench: Bench, forget: str, target: str, ranked: list[str], cell: dict) -> None:
    options = {**CENTRE, **cell}
    count = options.pop("targets", 1)
    names = {"artists": [a for a in EMOJI_ARTISTS if a != forget], "things": list(THINGS)}
    names["artists+things"] = names["artists"] + names["things"]
    options["retain"] = names.get(options.get("retain"), [])
    shrinkage, templates, sigma = options.pop("shrinkage", None), options.pop("templates", None), options.pop("sigma", None)
    with ExitStack() as patches:
        if shrinkage is not None:
            fit = Remap.fit
            patches.enter_context(patch.object(request.Remap, "fit", lambda *a, **k: fit(*a, **k, shrinkage=shrinkage)))
        if templates is not None:
            patches.enter_context(patch.object(concepts, "TEMPLATES", templates))
        if sigma is not None:
            general = concepts.packaged_prompts("everyday_prompts.txt")
            prompts = general if sigma == "general" else concepts.everyday_prompts(bench.pipe.tokenizer)[::sigma]
            patches.enter_context(patch.object(request, "everyday_prompts", lambda tokenizer: prompts))
        remap_to = None if count == 0 else [target, *[name for name in ranked if name != target]][:count]
        more_hf.erase_concept(bench.pipe, forget, remap_to=remap_to, **options)


def best_two(lines: list[dict[str, str]]) -> list[str]:
    """The cells with the best scores that set different arguments, the centre left out: with both at once they are crossed."""
    singles = sorted((line for line in lines if FACTORS.get(line["cell"])), key=lambda line: -float(line["score"]))
    first = singles[0]["cell"]
    return [first, next(line["cell"] for line in singles if not FACTORS[first].keys() & FACTORS[line["cell"]].keys())]


def choose_defaults(names: list[str]) -> None:
    path = HERE / "defaults.csv"
    measured = {line["cell"] for line in done(path)}
    targets = {forget: names[0] for forget, names in read_targets("targets").items()}
    order = sorted(done(HERE / "targets_validation.csv"), key=lambda line: -float(line["score"]))
    bench = None
    for name in names or (*FACTORS, CROSSED):
        parts = best_two(done(path)) if name == CROSSED else [name]
        name, cell = " + ".join(parts), {key: value for part in parts for key, value in FACTORS[part].items()}
        if name in measured:
            continue
        bench = bench or Bench()
        pooled: dict[str, list[float]] = {}
        for forget in STYLES:
            ranked = [line["remap_to"] for line in order if line["forget"] == forget]
            erase(bench, forget, targets[forget], ranked, cell)
            for key, values in bench.measure(forget, others=2).items():
                pooled.setdefault(key, []).extend(values)
            more_hf.restore(bench.pipe)
        append(path, {"cell": name, **summary(pooled)})
    shown = ("cell", "style_f", "content_f", "style_r", "content_r", "lpips_f", "lpips_r", "lpips_none", "score")
    lines = [{column: line[column] if column == "cell" else float(line[column]) for column in shown} for line in done(path)]
    write_text(HERE / "defaults.md", markdown_table(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("targets", "defaults"))
    parser.add_argument("--cells", nargs="+", default=[], choices=[*FACTORS, CROSSED], help="only these cells of the defaults")
    args = parser.parse_args()
    if args.what == "targets":
        choose_targets()
    else:
        choose_defaults(args.cells)


if __name__ == "__main__":
    main()
