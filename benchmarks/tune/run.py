"""Tune for ten artists and ten things by their names alone, and measure what came out.

    python benchmarks/tune/run.py tune --output DIR        # a study for each name
    python benchmarks/tune/run.py measure --output DIR     # the recommended edits, by the shipped judges
    python benchmarks/tune/run.py rivals --output DIR      # and UCE and RECE with the same targets
    python benchmarks/tune/run.py agreement --output DIR   # the studies' judges beside the shipped ones
    python benchmarks/tune/run.py inside --output DIR      # a study that also tries the denoiser's inside
    python benchmarks/tune/run.py collect --output DIR     # this folder's CSV files
    python benchmarks/tune/run.py tables                   # and from these its tables and the figure

Each resumes where it stopped; `--kind artists` or `things` does a part. DIR holds studies and pictures. The
artists are measured on the prompts of benchmarks/artists/fresh, whose committed rows are the hand-picked
targets'; `tune` sees neither these prompts nor the shipped judges.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import process_time

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import more_hf
from more_hf.core.errors import MoreError
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.data import EMOJI_ARTISTS
from more_hf.diffusion.erase import erase
from more_hf.tuning.judge import features_of
from more_hf.tuning.search import Workshop, original_cases
from more_hf.tuning.study import Study
from more_hf_bench.artists.config import ARTISTS, THINGS, ArtistsConfig, Erasure
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import PromptRow, read_prompts, spread
from more_hf_bench.artists.rows import measured
from more_hf_bench.artists.run import EMOJI, run_artists
from more_hf_bench.artists.summary import numbers
from more_hf_bench.bootstrap import ClusterBootstrap
from more_hf_bench.columns import append_row, read_cells, read_rows, write_rows
from more_hf_bench.figures import panels, write_figure
from more_hf_bench.methods.registry import DIFFUSION
from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
FIELD = HERE.parent / "artists"
SAMPLING = {"num_inference_steps": 6, "guidance_scale": 4.0}  # the measurements take ten steps
BATCH = 24
# the things of emoji10 that are animals, food or vehicles, less the last
TEN_THINGS = (
    "cow face", "cat face", "pear", "hamburger", "turtle", "snail", "bicycle", "pizza", "penguin",
    "birthday cake",
)  # fmt: skip
NAMES = {"artists": EMOJI_ARTISTS, "things": TEN_THINGS}
KINDS = {"artists": ARTISTS, "things": THINGS}
FRESH = ArtistsConfig.from_dict(json.loads((FIELD / "fresh/config.json").read_text("utf-8")))
HAND_PICKED = "hand-picked target"
INSIDE = "Microsoft Flat"
OTHERS = 12  # pictures of other things
THINGS_TARGET = "emoji"  # hand-picked in benchmarks/artists/many
RIVALS = ("uce", "rece")
STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # parts of an edit
EDITS, PICTURES = 3, 6  # of each name, and of each edit, for the agreement
ROW = ("kind", "method", "forget", "remap_to", "case_number", "role", "recognized", "kept", "lpips")
MEASURES = ("recognized", "kept", "lpips_f", "lpips_r", "lpips_none", "lpips_d")


def load() -> DiffusionPipeline:
    pipe = more_hf.load_emoji_sd()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_once(folder: Path, workshop: Workshop) -> dict[str, Tensor]:
    """`Workshop.draw_originals`, but what an earlier study drew is read from a file."""
    originals = {}
    for name, cases in original_cases(workshop.setup).items():
        key = hashlib.sha256(json.dumps([(case.prompt, case.seed) for case in cases]).encode()).hexdigest()
        file = folder / f"{key[:16]}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            pictures = torch.cat([batch for _, batch in workshop.draw(cases)])
            save_file({"pictures": pictures}, file)
        originals[name] = load_file(file)["pictures"]
    return originals


def tune(output: Path, kinds: Sequence[str]) -> None:
    """A study for each name, which sees nothing but the name."""
    pipe = load()
    Workshop.draw_originals = lambda workshop: draw_once(output / "originals", workshop)
    for kind in kinds:
        for name in NAMES[kind]:
            if name in finished(output, kind):
                continue
            try:
                print(more_hf.tune(pipe, name, sampling=SAMPLING, batch_size=BATCH, folder=output / name))
            except MoreError as error:  # the judge cannot tell the name
                print(error)


def inside(output: Path, kinds: Sequence[str]) -> None:
    """One artist's study with edits inside the denoiser, and its processor seconds."""
    pipe = load()
    Workshop.draw_originals = lambda workshop: draw_once(output / "originals", workshop)
    start = process_time()
    study = more_hf.tune(
        pipe, INSIDE, sampling=SAMPLING, batch_size=BATCH, folder=output / "inside", reach="denoiser"
    )
    seconds = f"{INSIDE}, {process_time() - start:.0f} processor seconds, beside the original's pictures."
    write_text(HERE / "inside.md", f"{markdown_table(list(beside_by_name(study)))}\n\n{seconds}\n")


def beside_by_name(study: Study) -> Iterator[dict]:
    """What the edits inside the denoiser do to the pictures of their trial, and those by name to the same."""
    judged = pd.DataFrame(map(asdict, study.judgments))
    for inside in judged[judged["edit"].str.endswith(", reach denoiser")]["edit"].unique():
        pictures = judged[judged["edit"] == inside][["role", "number"]]
        for label in (inside.removesuffix(", reach denoiser"), inside):
            own = judged[judged["edit"] == label].merge(pictures).groupby("role")
            line = {"edit": label, "pictures": len(own.get_group("concept"))}
            line["recognized"] = f"{100 * own['recognized'].mean()['concept']:.0f} %"
            yield {**line, **own["distance"].mean()[["concept", "retained", "nameless"]].round(3).to_dict()}


def finished(output: Path, kind: str) -> list[str]:
    """The names whose study has ended."""
    names = []
    for name in NAMES[kind]:
        file = output / name / "study.json"
        if file.exists() and json.loads(file.read_text("utf-8"))["choices"]:
            names.append(name)
    return names


def by_study(output: Path, pipe, concepts, *, remap_to, retain):
    """The recommended edit."""
    return erase(pipe, Study.load(output / concepts[0]).choices[0].request)


def to_one_word(pipe, concepts, *, remap_to, retain):
    """The target of all things in benchmarks/artists/many."""
    return more_hf.erase_concept(pipe, concepts, remap_to=[THINGS_TARGET], retain=retain)


def measure(output: Path, kinds: Sequence[str], rivals: Sequence[str] = ()) -> None:
    """Draw the recommended edits, and rivals with the same target, by the benchmark's own run."""
    tuned = json.loads((FIELD / "settings.json").read_text("utf-8"))
    functions = {"tuned": partial(by_study, output)}
    for rival in rivals:
        functions[f"{rival}, same target"] = partial(DIFFUSION[rival].load(), **tuned[rival])
    for kind in kinds:
        prompts = read_prompts("emoji108", KINDS[kind])
        erasures = {}
        for name in finished(output, kind):
            target = list(Study.load(output / name).choices[0].request.targets)
            if kind == "artists":  # the very pictures of the committed rows
                own = set(FRESH.forget[name].cases)
                named = [
                    row.case_number for row in prompts.rows if row.case_number in own and row.artist == name
                ]
                others = sorted(own.difference(named))[::4]
                erasures[name] = replace(
                    FRESH.forget[name], remap_to=target, several=None, cases=[*named, *others]
                )
                continue
            rows = [row for row in prompts.rows if row.thing == name]
            rows += spread(prompts, [other for other in prompts.names if other != name], OTHERS, name)
            retain = [other for other in TEN_THINGS if other != name]
            cases = [row.case_number for row in rows]
            erasures[name] = Erasure(remap_to=target, several=None, retain=retain, cases=cases)
        run_artists(
            load(),
            functions if kind == "artists" else {**functions, HAND_PICKED: to_one_word},
            prompts,
            erasures,
            remap_to=None,
            output=output / f"measured-{kind}",
            judges=EmojiJudges(),
            batch_size=BATCH,
            **EMOJI,
        )


def agreement(output: Path, kinds: Sequence[str]) -> None:
    """Parts of three edits of each name, judged by its study's judge and by the shipped one."""
    file, pipe, shipped = output / "agreement.csv", load(), EmojiJudges()
    done = {(line["name"], line["target"], line["strength"]) for line in read_cells(file)}
    for kind in kinds:
        for name in finished(output, kind):
            setup = Study.load(output / name).setup
            targets = setup.candidates[:: max(1, len(setup.candidates) // EDITS)][:EDITS]
            points = [(target, strength) for target in targets for strength in STRENGTHS]
            points = [point for point in points if (name, point[0], str(point[1])) not in done]
            if not points:
                continue
            workshop = Workshop(pipe, setup, batch_size=BATCH)
            workshop.fit_judges(draw_once(output / "originals", workshop))
            cases = setup.cases(setup.pictures)[:PICTURES]
            for target, strength in points:
                with workshop.edited(workshop.at_strength(workshop.edit(target), strength)):
                    ((_, pictures),) = workshop.draw(cases)
                taken_for = workshop.names_judge.taken_for(features_of(pictures), range(PICTURES))
                rows = [PromptRow(0, case.prompt, 0, "", name if kind == "things" else "") for case in cases]
                style, content = shipped.judge(pictures, rows)
                own, theirs = taken_for.count(name), style.count(name) if kind == "artists" else sum(content)
                line = {"kind": kind, "name": name, "target": target, "strength": strength}
                append_row(file, {**line, "pictures": PICTURES, "own": own, "shipped": theirs})


def collect(output: Path, kinds: Sequence[str]) -> None:
    """Write this folder's CSV files from a folder of studies and pictures."""
    studies, rows = [], []
    for kind in kinds:
        for name in finished(output, kind):
            study = Study.load(output / name)
            best, judge = study.choices[0], study.judge
            line = {"kind": kind, "name": name, "edit": best.label, "choices": len(study.choices)}
            drawn = len(study.judgments), sum(map(len, original_cases(study.setup).values()))
            line |= {"pictures": drawn[0], "originals": drawn[1]}
            line |= {key: round(estimate.value, 4) for key, estimate in judge.items()}
            for key in ("recognized", "kept", "changed", "retained", "nameless"):
                line[f"own_{key}"] = round(getattr(best.figures, key).value, 4)
            studies.append(line)
        folder = output / f"measured-{kind}"
        config = ArtistsConfig.from_dict(json.loads((folder / "config.json").read_text("utf-8")))
        parts = [measured(read_rows(folder / "rows.csv"), config)]
        if kind == "artists":
            fresh = measured(read_rows(FIELD / "fresh/rows.csv"), FRESH)
            committed = {"more": HAND_PICKED, **{rival: f"{rival}, hand-picked" for rival in RIVALS}}
            fresh = fresh[fresh["method"].isin(committed)]
            # the same cases of the names that were tuned, and no others
            same = ["forget", "case_number"]
            fresh = fresh.merge(parts[0][same].drop_duplicates(), on=same)
            parts.append(fresh.assign(method=fresh["method"].map(committed)))
        part = pd.concat(parts)
        part = part[part["method"] != "original"]
        role = part["is_forgotten"].map({True: "f", False: "r"}).where(part["concept"] != "", "none")
        part = part.assign(kind=kind, role=role, recognized=part["gone_after"], kept=part["kept_after"])
        rows += part[list(ROW)].round(4).to_dict("records")
    write_rows(HERE / "studies.csv", studies)
    write_rows(HERE / "rows.csv", rows)
    write_rows(HERE / "agreement.csv", read_rows(output / "agreement.csv"))


def summarize(rows: pd.DataFrame) -> list[dict]:
    """A line for each method: its means, and `tuned` less it, with paired intervals over prompts."""
    draws = ClusterBootstrap(rows[["forget", "case_number"]])
    found = {}
    for method, own in rows.groupby("method", sort=False):
        by_role = {role: own[own["role"] == role] for role in ("f", "r", "none")}
        means = {key: draws.mean(by_role["f"][key]) for key in ("recognized", "kept")}
        means |= {f"lpips_{role}": draws.mean(part["lpips"]) for role, part in by_role.items()}
        means["lpips_d"] = means["lpips_f"] - means["lpips_r"]
        found[method] = means
    lines = []
    for method, means in found.items():
        line = {"method": method}
        for key, estimate in means.items():
            line |= numbers(key, estimate)
            less = found["tuned"][key] - estimate
            line |= numbers(f"tuned less {key}", less) if method != "tuned" else {}
        lines.append(line)
    return lines


def tables() -> None:
    """Write summary.csv, the Markdown tables and the figure from the CSV files."""
    rows, lines = read_rows(HERE / "rows.csv"), []
    for kind, own in rows.groupby("kind", sort=False):
        lines += [{"kind": kind, **line} for line in summarize(own)]
    write_rows(HERE / "summary.csv", lines)
    parts = [markdown_table([shown(line) for line in lines if line["kind"] == kind]) for kind in NAMES]
    studies = read_cells(HERE / "studies.csv")
    columns = ("name", "edit", "found", "mistaken", "own_recognized", "own_kept", "own_changed", "pictures")
    parts.append(markdown_table(studies, columns))
    judged = read_rows(HERE / "agreement.csv")
    parts.append(markdown_table(list(agreeing(judged))))
    write_text(HERE / "table.md", "\n\n".join(parts) + "\n")
    draw_agreement(judged)


def shown(line: dict) -> dict[str, str]:
    """A line for a reader; a star where the interval of `tuned` less this method leaves out 0."""
    cells = {"method": line["method"]}
    for key in MEASURES:
        if pd.isna(line.get(key)):
            continue
        low, high = line.get(f"tuned less {key}_low"), line.get(f"tuned less {key}_high")
        star = "*" if not pd.isna(low) and not low <= 0 <= high else ""
        decimals = 1 if key in ("recognized", "kept") else 3
        cells[key] = f"{line[key]:.{decimals}f}{star}"
    return cells


def agreeing(judged: pd.DataFrame) -> Iterator[dict]:
    """How the two judges agree over all edits, and over those of each kind."""
    for kind, own in [("all", judged), *judged.groupby("kind", sort=False)]:
        shares = own["own"] / own["pictures"], own["shipped"] / own["pictures"]
        yield {
            "kind": kind,
            "edits": len(own),
            "rank correlation": float(shares[0].rank().corr(shares[1].rank())),
            "studies' judges": float(100 * shares[0].mean()),
            "shipped judges": float(100 * shares[1].mean()),
            "mean distance, points": float(100 * (shares[0] - shares[1]).abs().mean()),
        }


def draw_agreement(judged: pd.DataFrame) -> None:
    figure, axes = panels(2, width=4, height=4)
    for axis, (kind, own) in zip(axes, judged.groupby("kind", sort=False), strict=True):
        counts = own.groupby(["own", "shipped"]).size().reset_index(name="edits")
        axis.scatter(100 * counts["own"] / PICTURES, 100 * counts["shipped"] / PICTURES, 12 * counts["edits"])
        axis.set_title(f"{kind}: an edit's pictures that are recognized, %", fontsize=9)
        axis.set_xlabel("by the study's judge")
        axis.set_ylabel("by the shipped judge")
        axis.plot([0, 100], [0, 100], color="gray", lw=0.5)
    write_figure(HERE / "agreement.png", figure)


def main() -> None:
    parser = argument_parser(__doc__)
    stages = {"tune": tune, "measure": measure, "agreement": agreement, "collect": collect}
    stages |= {"rivals": partial(measure, rivals=RIVALS), "inside": inside}
    parser.add_argument("stage", choices=[*stages, "tables"])
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of studies and pictures")
    parser.add_argument("--kind", choices=list(NAMES), help="only these names")
    args = parser.parse_args()
    if args.stage == "tables":
        tables()
    else:
        stages[args.stage](args.output, list(NAMES) if args.kind is None else [args.kind])


if __name__ == "__main__":
    main()
