"""The demo: erase artists from the embedded pipeline, and show what changed and what did not."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import more_hf
from more_hf.core.erasure import Erasure
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table, number
from more_hf.data import EMOJI_ARTISTS, load_emoji_sd
from more_hf.diffusion.grid import draw_grid

from ..columns import write_rows
from ..figures import write_picture
from ..page import Section, write_page
from .config import JOINT
from .findings import Finding, spelt
from .generate import generate
from .grid import stack, to_pil
from .judges import EmojiJudges
from .lpips import lpips_distance


THINGS = (
    "cat face", "rocket", "pizza", "sunflower", "house", "guitar", "crab", "bicycle", "red heart",
    "mushroom", "crown", "balloon", "cactus", "penguin", "bus", "umbrella", "strawberry", "fish",
)  # fmt: skip
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


@dataclass(frozen=True)
class DemoRow:
    """One prompt of the demo. `artist` is empty where the prompt names none."""

    group: str
    thing: str
    artist: str
    seed: int

    @property
    def prompt(self) -> str:
        return f"a {self.thing} in the style of {self.artist}" if self.artist else f"a {self.thing}"


@dataclass(frozen=True)
class Settings:
    """
    The demo's settings.

    Args:
        concepts (`list[str]`):
            The artists to erase together, of `EMOJI_ARTISTS`.
        remap_to (`list[str]`, *optional*):
            The artists they are sent to; `None` erases without remapping.
        limit (`int`):
            Number of prompts in each of the three groups.
        steps, guidance, batch_size:
            As in [`~more_hf_bench.artists.generate.generate`].
        seed (`int`):
            The first prompt's seed; the others count up from it.
    """

    concepts: list[str]
    remap_to: list[str] | None
    limit: int
    steps: int
    guidance: float
    seed: int
    batch_size: int

    @property
    def forgotten(self) -> str:
        """The erased artists in one phrase."""
        return JOINT.join(self.concepts)

    @property
    def targets(self) -> list[str]:
        """The targets in the form of the command line."""
        return self.remap_to or ["none"]

    @property
    def command(self) -> str:
        return (
            f"more-hf demo --concept {' '.join(map(repr, self.concepts))} "
            f"--remap_to {' '.join(map(repr, self.targets))} "
            f"--limit {self.limit} --steps {self.steps} --guidance {self.guidance:g} --seed {self.seed}"
        )


@dataclass(frozen=True)
class Result:
    """
    The demo's pictures and measurements.

    Args:
        rows (`list[DemoRow]`):
            The prompts: forgotten artist, other artists, no artist.
        before, after (`torch.Tensor`):
            Their pictures, uint8 of shape `(n, 3, H, W)`.
        target (`torch.Tensor`, *optional*):
            With a single target, the original's pictures of it in place of the forgotten artist.
        measured (`pd.DataFrame`):
            The lines of `rows.csv`.
        erasure (`Erasure`):
            The erasure.
        scheduler (`str`):
            The class of the pipeline's scheduler.
    """

    rows: list[DemoRow]
    before: Tensor
    after: Tensor
    target: Tensor | None
    measured: pd.DataFrame
    erasure: Erasure
    scheduler: str


def demo_rows(concepts: Sequence[str], *, limit: int, seed: int) -> list[DemoRow]:
    """
    List the prompts: `limit` for the forgotten artists in turn, for the others in turn, and without an
    artist, in this order. Every prompt has its own seed, counted up from `seed`.
    """
    others = [artist for artist in EMOJI_ARTISTS if artist not in concepts]
    rows = []
    for group, artists in (("forget", concepts), ("remain", others), ("no artist", [""])):
        for i in range(limit):
            # Ask all artists for one thing in turn, then for the next thing.
            thing, artist = divmod(i, len(artists))
            rows.append((group, THINGS[thing % len(THINGS)], artists[artist]))
    return [DemoRow(*row, seed + i) for i, row in enumerate(rows)]


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
    `table.md` and `report.html` into `output`, which is created if needed. The other arguments are those of
    [`Settings`].
    """
    settings = Settings(concepts, remap_to, limit, steps, guidance, seed, batch_size)
    result = measure(settings)
    text = write_outputs(settings, result, output)
    print(f"\n{text}\n\n{result.erasure}\n")
    print(f"Open {output / 'before_after.webp'} and {output / 'report.html'}.")
    print(f"The numbers are in {output / 'rows.csv'}.")


def measure(settings: Settings) -> Result:
    """Draw every prompt before and after the erasure."""

    def draw(rows: Sequence[DemoRow], desc: str) -> Tensor:
        return generate(
            pipe,
            [row.prompt for row in rows],
            [row.seed for row in rows],
            steps=settings.steps,
            guidance=settings.guidance,
            batch_size=settings.batch_size,
            desc=desc,
        )

    rows, judges = demo_rows(settings.concepts, limit=settings.limit, seed=settings.seed), EmojiJudges()
    pipe = load_emoji_sd()
    before = draw(rows, "before")
    target = None
    if settings.remap_to is not None and len(settings.remap_to) == 1:
        # With a single target there is a right answer: the original's pictures of the target.
        wanted = [replace(row, artist=settings.remap_to[0]) for row in rows[: settings.limit]]
        target = draw(wanted, "target")
    more_hf.erase_concept(pipe, settings.concepts, remap_to=settings.remap_to)
    after = draw(rows, "after")
    lines = []
    for i, row in enumerate(rows):
        line = {"method": "more", "forget": settings.forgotten, "group": row.group, "case_number": i}
        line |= {"prompt": row.prompt, "evaluation_seed": row.seed, "artist": row.artist, "thing": row.thing}
        lines.append(line)
    measured = pd.DataFrame(lines)
    measured["lpips"] = lpips_distance(before, after).double().round(decimals=6).numpy()
    judged = judges.judge(before, rows), judges.judge(after, rows)
    measured["style_before"], measured["style_after"] = (styles for styles, _ in judged)
    measured["content_before"], measured["content_after"] = (contents for _, contents in judged)
    scheduler = type(pipe.scheduler).__name__
    return Result(rows, before, after, target, measured, more_hf.get_erasure(pipe), scheduler)


def summarise(settings: Settings, result: Result) -> tuple[Finding, list[dict[str, Any]]]:
    """Summarise the result: a finding for a sentence, and a line per group of prompts for a table."""
    lines, means = [], []
    for group, part in result.measured.groupby("group", sort=False):
        asks_for_artist = (part["artist"] != "").any()
        styles, contents = [], []
        for when in ("before", "after"):
            recognised = 100 * (part[f"style_{when}"] == part["artist"]).mean()
            styles.append(recognised if asks_for_artist else None)
            contents.append(100 * part[f"content_{when}"].mean())
        lpips = part["lpips"].mean()
        means.append(Finding(settings.forgotten, *styles, *contents, lpips_f=lpips, lpips_r=None))
        line = {
            "prompts": GROUPS[group].format(forgotten=settings.forgotten),
            "pictures": len(part),
            "artist recognised": _arrow(styles),
            "thing recognised": _arrow(contents),
            "moved (LPIPS)": lpips,
        }
        if result.target is not None:
            distances: list[float | None] = [None, None]
            if group == "forget":
                images = (result.before[: settings.limit], result.after[: settings.limit])
                distances = [lpips_distance(each, result.target).mean().item() for each in images]
            line[f"distance to {settings.targets[0]}, before → after"] = _arrow(distances, number)
        lines.append(line)
    forgotten, remaining, _ = means
    return replace(forgotten, lpips_r=remaining.lpips_f), lines


def _arrow(values: Sequence[float | None], text: Callable[[float], str] = "{:.0f} %".format) -> str:
    """A number before and after; empty if it was not measured."""
    before, after = values
    return "" if before is None else f"{text(before)} → {text(after)}"


def write_outputs(settings: Settings, result: Result, output: Path) -> str:
    """Write all files into `output`; return what the command prints: finding, table and explanation."""
    finding, table = summarise(settings, result)
    origin, report = _origin(settings, result), result.erasure.rows()
    explanation = EXPLANATION if result.target is None else EXPLANATION + TARGET_EXPLANATION
    text = "\n\n".join([str(finding), markdown_table(table), explanation])
    made_with = "; ".join(value if isinstance(value, str) else ", ".join(value) for value in origin.values())
    details = ["<details><summary>What was done, and the guarantees</summary>", result.erasure.to_markdown()]
    parts = [text, f"Made with {made_with}.", *details, "</details>"]
    write_text(output / "table.md", "\n\n".join(parts) + "\n")
    write_rows(output / "rows.csv", result.measured)
    picture = _picture(settings, result)
    write_picture(output / "before_after.webp", picture)

    drawn = f"{settings.steps} steps, guidance {settings.guidance:g}, the same noise before and after."
    write_page(
        output / "report.html",
        title=f"{spelt(settings.forgotten)} erased",
        finding=str(finding),
        sections=[
            Section("Before and after", pictures={drawn: picture}),
            Section("Did it work?", explanation, table=table),
            Section(
                "What was done, and the guarantees",
                facts={name.replace("`", ""): value for name, value in report},
                folded=True,
            ),
            Section("How it was made", facts=origin, files=("table.md", "rows.csv"), folded=True),
        ],
    )
    return text


def _origin(settings: Settings, result: Result) -> dict[str, str | list[str]]:
    height, width = result.after.shape[-2:]
    packages = [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")]
    return {
        "command": settings.command,
        "pipeline": f"emoji-sd, {result.scheduler}, {width} x {height} pixels",
        "LPIPS": "alex 0.1, no resize",
        "versions": [f"more_hf {more_hf.__version__}", *packages],
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }


def _picture(settings: Settings, result: Result) -> Image.Image:
    """Draw a strip per group: before above after, and below them the original's pictures of the target."""
    sheets = []
    for i, (group, name) in enumerate(GROUPS.items()):
        title = name.format(forgotten=spelt(settings.forgotten))
        first = i * settings.limit
        strip = slice(first, first + min(COLUMNS, settings.limit))
        pictures = {"before": result.before[strip], "after": result.after[strip]}
        if group == "forget" and result.target is not None:
            title += f"; the target is {settings.targets[0]}"
            pictures["target"] = result.target[strip]
        # The labels need not repeat that there is no artist, or the artist in the title.
        same_artist = group == "no artist" or group == "forget" and len(settings.concepts) == 1
        labels = [row.thing if same_artist else f"{row.thing} {row.artist}" for row in result.rows[strip]]
        drawn = {label: [to_pil(image) for image in images] for label, images in pictures.items()}
        sheets.append(draw_grid(drawn, column_labels=labels, scale=2, title=title))
    return stack(sheets)
