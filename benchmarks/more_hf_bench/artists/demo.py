"""The demo: erase artists from the embedded pipeline, and show what changed and what did not."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import more_hf
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table, number
from more_hf.data import EMOJI_ARTISTS, load_emoji_sd
from more_hf.diffusion.grid import draw_grid, stack
from more_hf.tuning.judge import lpips_distance

from ..columns import write_rows
from ..figures import write_picture
from ..page import Section, write_page
from .config import JOINT
from .findings import Finding, spelt
from .generate import generate
from .grid import to_pil
from .judges import EmojiJudges
from .prompts import PromptRow


THINGS = (
    "cat face", "rocket", "pizza", "sunflower", "house", "guitar", "crab", "bicycle", "red heart",
    "mushroom", "crown", "balloon", "cactus", "penguin", "bus", "umbrella", "strawberry", "fish",
)  # fmt: skip
WHENS = ("before", "after")
COLUMNS = 9  # of the picture: one per artist that stays
GROUPS = {"forget": "{forgotten}, forgotten", "remain": "other artists", "no artist": "no artist"}

EXPLANATION = (
    "Recognised: how often a judge that was fitted on real images sees the artist, and the thing, that the "
    "prompt asks for. Moved: the distance (LPIPS) between the pictures before and after, which start from "
    "the same noise."
)
TARGET_EXPLANATION = (
    " Noise would be far from what was there, too, so the last column says how far the pictures are "
    "from what the original draws when it is asked for the target."
)


def demo_rows(concepts: Sequence[str], *, limit: int, seed: int) -> list[PromptRow]:
    """
    List the prompts: `limit` for the forgotten artists in turn, for the others in turn, and without an
    artist, in this order. Every prompt has its own seed, counted up from `seed`.
    """
    others = [artist for artist in EMOJI_ARTISTS if artist not in concepts]
    rows: list[PromptRow] = []
    for group, artists in (("forget", concepts), ("remain", others), ("no artist", [""])):
        for i in range(limit):
            # Ask all artists for one thing in turn, then for the next thing.
            turn, of_artists = divmod(i, len(artists))
            thing, artist = THINGS[turn % len(THINGS)], artists[of_artists]
            case = len(rows)
            rows.append(PromptRow(case, prompt_of(thing, artist), seed + case, artist, thing, group))
    return rows


def prompt_of(thing: str, artist: str) -> str:
    """The prompt that asks for a thing, by an artist or by none."""
    return f"a {thing} in the style of {artist}" if artist else f"a {thing}"


def run_demo(
    concepts: list[str],
    remap_to: list[str] | None,
    *,
    limit: int,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int,
    output: Path,
) -> None:
    """
    Run the demo: generate, erase, generate again, print a table, and write `before_after.webp`, `rows.csv`,
    `table.md` and `report.html` into `output`, which is created if needed. The arguments are those of
    `more-hf demo`, whose help says what they are; `remap_to` is `None` to erase without remapping.
    """

    def draw(rows: Sequence[PromptRow], desc: str) -> Tensor:
        prompts, seeds = [row.prompt for row in rows], [row.evaluation_seed for row in rows]
        drawing = {"steps": steps, "guidance": guidance, "batch_size": batch_size}
        return generate(pipe, prompts, seeds, desc=desc, **drawing)

    # 1. Every prompt, drawn before and after the erasure.
    rows, pipe = demo_rows(concepts, limit=limit, seed=seed), load_emoji_sd()
    pictures = {"before": draw(rows, "before")}
    target = None
    if remap_to is not None and len(remap_to) == 1:
        # With a single target there is a right answer: the original's pictures of the target.
        (target,) = remap_to
        wanted = [replace(row, prompt=prompt_of(row.thing, target)) for row in rows[:limit]]
        pictures["target"] = draw(wanted, "target")
    more_hf.erase_concept(pipe, concepts, remap_to=remap_to)
    pictures["after"] = draw(rows, "after")

    # 2. What was measured, as a sentence and as a table.
    forgotten = JOINT.join(concepts)
    measured = measure(rows, pictures, forgotten)
    finding, table = summarise(measured, pictures, target, forgotten)
    explanation = EXPLANATION if target is None else EXPLANATION + TARGET_EXPLANATION
    text = "\n\n".join([str(finding), markdown_table(table), explanation])

    # 3. The files.
    command = (
        f"more-hf demo --concept {' '.join(map(repr, concepts))} "
        f"--remap_to {' '.join(map(repr, remap_to or ['none']))} "
        f"--limit {limit} --steps {steps} --guidance {guidance:g} --seed {seed}"
    )
    height, width = pictures["after"].shape[-2:]
    packages = [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")]
    made_with = [
        command,
        f"emoji-sd, {type(pipe.scheduler).__name__}, {width} x {height} pixels",
        "alex 0.1, no resize",
        ", ".join([f"more_hf {more_hf.__version__}", *packages]),
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    ]
    erasure, picture = more_hf.get_erasure(pipe), draw_picture(rows, pictures, target, concepts)
    guarantees = "What was done, and the guarantees"
    details = [f"<details><summary>{guarantees}</summary>", erasure.to_markdown(), "</details>"]
    write_text(
        output / "table.md", "\n\n".join([text, f"Made with {'; '.join(made_with)}.", *details]) + "\n"
    )
    write_rows(output / "rows.csv", measured)
    write_picture(output / "before_after.webp", picture)
    drawn = f"{steps} steps, guidance {guidance:g}, the same noise before and after."
    facts = [f"{name}: {value}" for name, value in erasure.rows()]
    write_page(
        output / "report.html",
        title=f"{spelt(forgotten)} erased",
        finding=str(finding),
        sections=[
            Section("Before and after", pictures={drawn: picture}),
            Section("Did it work?", explanation, table=table),
            Section(guarantees, facts=facts, folded=True),
            Section("How it was made", facts=made_with, files=("table.md", "rows.csv"), folded=True),
        ],
    )
    print(f"\n{text}\n\n{erasure}\n")
    print(f"Open {output / 'before_after.webp'} and {output / 'report.html'}.")
    print(f"The numbers are in {output / 'rows.csv'}.")


def measure(rows: Sequence[PromptRow], pictures: dict[str, Tensor], forgotten: str) -> pd.DataFrame:
    """The lines of `rows.csv`: each prompt, how far its picture moved, and what the judges see."""
    columns = ["group", "case_number", "prompt", "evaluation_seed", "artist", "thing"]
    measured = pd.DataFrame(rows)[columns]
    measured.insert(0, "method", "more")
    measured.insert(1, "forget", forgotten)
    distances = lpips_distance(pictures["before"], pictures["after"])
    measured["lpips"] = distances.double().round(decimals=6).numpy()
    judges = EmojiJudges()
    judged = judges.judge(pictures["before"], rows), judges.judge(pictures["after"], rows)
    measured["style_before"], measured["style_after"] = (styles for styles, _ in judged)
    measured["content_before"], measured["content_after"] = (contents for _, contents in judged)
    return measured


def summarise(
    measured: pd.DataFrame, pictures: dict[str, Tensor], target: str | None, forgotten: str
) -> tuple[Finding, list[dict[str, Any]]]:
    """A finding for a sentence, and a line per group of prompts for a table."""
    lines, means = [], []
    for group, part in measured.groupby("group", sort=False):
        styles = [100 * (part[f"style_{when}"] == part["artist"]).mean() for when in WHENS]
        if not part["artist"].any():
            styles = [None, None]
        contents = [100 * part[f"content_{when}"].mean() for when in WHENS]
        lpips = part["lpips"].mean()
        means.append(Finding(forgotten, *styles, *contents, lpips_f=lpips, lpips_r=None))
        line = {
            "prompts": GROUPS[group].format(forgotten=forgotten),
            "pictures": len(part),
            "artist recognised": _arrow(styles),
            "thing recognised": _arrow(contents),
            "moved (LPIPS)": lpips,
        }
        if target is not None:
            distances: list[float | None] = [None, None]
            if group == "forget":
                own = [pictures[when][: len(part)] for when in WHENS]
                distances = [lpips_distance(each, pictures["target"]).mean().item() for each in own]
            line[f"distance to {target}, before → after"] = _arrow(distances, number)
        lines.append(line)
    forgotten_ones, remaining, _ = means
    return replace(forgotten_ones, lpips_r=remaining.lpips_f), lines


def _arrow(values: Sequence[float | None], text: Callable[[float], str] = "{:.0f} %".format) -> str:
    """A number before and after; empty if it was not measured."""
    before, after = values
    return "" if before is None else f"{text(before)} → {text(after)}"


def draw_picture(
    rows: Sequence[PromptRow], pictures: dict[str, Tensor], target: str | None, concepts: Sequence[str]
) -> Image.Image:
    """Draw a strip per group: before above after, and below them the original's pictures of the target."""
    sheets = []
    for group, name in GROUPS.items():
        title = name.format(forgotten=spelt(JOINT.join(concepts)))
        shown = [row for row in rows if row.group == group][:COLUMNS]
        whens = list(WHENS)
        if group == "forget" and target is not None:
            title += f"; the target is {target}"
            whens.append("target")
        # The labels need not repeat that there is no artist, or the artist in the title.
        same_artist = group == "no artist" or group == "forget" and len(concepts) == 1
        labels = [row.thing if same_artist else f"{row.thing} {row.artist}" for row in shown]
        drawn = {when: [to_pil(pictures[when][row.case_number]) for row in shown] for when in whens}
        sheets.append(draw_grid(drawn, column_labels=labels, scale=2, title=title))
    return stack(sheets)
