"""The demo: erase artists from the embedded pipeline, and show what changed and what did not."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import more_hf
from more_hf.core.erasure import measured_rows
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.data import EMOJI_ARTISTS, load_emoji_sd

from ...diffusion.grid import draw_grid, stack
from ..columns import write_rows
from ..page import Pair, Section, write_page
from .generate import generate
from .grid import to_pil
from .lpips import lpips_distance
from .rows import JOINT


THINGS = (
    "cat face", "rocket", "pizza", "sunflower", "house", "guitar", "crab", "bicycle", "red heart",
    "mushroom", "crown", "balloon", "cactus", "penguin", "bus", "umbrella", "strawberry", "fish",
)  # fmt: skip
COLUMNS = 9  # of the picture: one per artist that stays
SHOWN_FACTS = (
    "remap_to", "retain", "tokens", "solver", "solver_reason", "rank", "num_experts", "router",
    "condition_number", "leaks", "base", "fingerprint",
)  # fmt: skip

EXPLANATION = (
    "LPIPS is the distance between a picture before and after: lpips_f of the forgotten artist should be "
    "large, lpips_r of the others and lpips_no_artist small; lpips_d = lpips_f - lpips_r."
)
TARGET_EXPLANATION = (
    " Noise would score well, too, so lpips_to_target compares the forgotten artist's pictures after, and "
    "lpips_to_target_before those before, with what the original draws when it is asked for the target."
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
    What the demo does.

    Args:
        concepts (`list[str]`):
            The artists to erase together, of `EMOJI_ARTISTS`.
        remap_to (`list[str]`, *optional*):
            The artists they are sent to; `None` erases without remapping.
        limit (`int`):
            Prompts in each of the three groups.
        steps, guidance, batch_size:
            As in [`~more_hf.bench.artists.generate.generate`].
        seed (`int`):
            The first prompt's; the others count up.
    """

    concepts: list[str]
    remap_to: list[str] | None
    limit: int
    steps: int
    guidance: float
    seed: int
    batch_size: int

    @property
    def targets(self) -> list[str]:
        """The targets as the command line has them."""
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
    What the demo drew and measured.

    Args:
        rows (`list[DemoRow]`):
            The prompts: forgotten artist, other artists, no artist.
        before, after (`torch.Tensor`):
            Their pictures, uint8 of shape `(n, 3, H, W)`.
        target (`torch.Tensor`, *optional*):
            If there is one target: what the original draws for it in place of the forgotten artist.
        lpips (`torch.Tensor`):
            The distances between before and after, `(n,)`.
        erasure:
            What `get_erasure` returned.
        scheduler (`str`):
            The class of the pipeline's scheduler.
    """

    rows: list[DemoRow]
    before: Tensor
    after: Tensor
    target: Tensor | None
    lpips: Tensor
    erasure: Any
    scheduler: str


def demo_rows(concepts: Sequence[str], *, limit: int, seed: int) -> list[DemoRow]:
    """
    List the prompts: `limit` of the forgotten artists in turn, of the others in turn, and without an artist,
    in this order. Every prompt has a seed of its own, counted up from `seed`.
    """
    others = [artist for artist in EMOJI_ARTISTS if artist not in concepts]
    rows = []
    for group, artists in (("forget", concepts), ("remain", others), ("no artist", [""])):
        for i in range(limit):
            # One thing for all artists in turn, then the next thing.
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
    Run the demo: generate, erase, generate again, print a table, and write `before_after.png`, `rows.csv`,
    `table.md` and `report.html` into `output`, which is created if need be. The other arguments are those of
    [`Settings`].
    """
    settings = Settings(concepts, remap_to, limit, steps, guidance, seed, batch_size)
    result = measure(settings)
    text = write_outputs(settings, result, output)
    print(f"\n{text}\n")
    print(f"Open {output / 'before_after.png'} and {output / 'report.html'}.")
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

    rows = demo_rows(settings.concepts, limit=settings.limit, seed=settings.seed)
    pipe = load_emoji_sd()
    before = draw(rows, "before")
    target = None
    if settings.remap_to is not None and len(settings.remap_to) == 1:
        # With one target there is a right answer: what the original draws when it is asked for the target.
        wanted = [replace(row, artist=settings.remap_to[0]) for row in rows[: settings.limit]]
        target = draw(wanted, "target")
    more_hf.erase_concept(pipe, settings.concepts, remap_to=settings.remap_to)
    after = draw(rows, "after")
    erasure, scheduler = more_hf.get_erasure(pipe), type(pipe.scheduler).__name__
    return Result(rows, before, after, target, lpips_distance(before, after), erasure, scheduler)


def summarise(settings: Settings, result: Result) -> dict[str, Any]:
    """The demo's numbers in one line."""
    limit = settings.limit
    lpips_f, lpips_r, lpips_no_artist = (group.mean().item() for group in result.lpips.split(limit))
    summary = {
        "method": "more",
        "forget": JOINT.join(settings.concepts),
        "remap_to": ", ".join(settings.targets),
        "n_f": limit,
        "n_r": limit,
        "lpips_f": lpips_f,
        "lpips_r": lpips_r,
        "lpips_d": lpips_f - lpips_r,
        "lpips_no_artist": lpips_no_artist,
    }
    if result.target is not None:
        for name, images in (("_before", result.before), ("", result.after)):
            distance = lpips_distance(images[:limit], result.target)
            summary[f"lpips_to_target{name}"] = distance.mean().item()
    return summary


def write_outputs(settings: Settings, result: Result, output: Path) -> str:
    """Write all files into `output`; return the text of `table.md`."""
    summary, origin = summarise(settings, result), _origin(settings, result)
    explanation = EXPLANATION if result.target is None else EXPLANATION + TARGET_EXPLANATION
    made_with = "; ".join(value if isinstance(value, str) else ", ".join(value) for value in origin.values())
    erasure = result.erasure
    text = "\n\n".join(
        [markdown_table([summary]), explanation, f"Made with {made_with}.", erasure.to_markdown()]
    )
    write_text(output / "table.md", f"{text}\n")
    write_rows(output / "rows.csv", _csv_rows(settings, result))
    _picture(settings, result).save(output / "before_after.png")

    pairs = [
        Pair(to_pil(before), to_pil(after), row.prompt, lpips)
        for row, before, after, lpips in zip(
            result.rows, result.before, result.after, result.lpips.tolist(), strict=True
        )
    ]
    facts, limit = erasure.to_dict(), settings.limit
    checks = measured_rows(erasure.guarantees, erasure.proof)
    write_page(
        output / "report.html",
        title=f"{', '.join(settings.concepts)} erased",
        intro=f"Embedded pipeline, {len(pairs)} prompts before and after, {settings.steps} steps, guidance "
        f"{settings.guidance:g}, seeds {result.rows[0].seed} to {result.rows[-1].seed}, each pair from the "
        f"same noise. {explanation}",
        sections=[
            Section("How far the pictures moved", table=[summary], facts=origin),
            Section(
                "What was done",
                facts={
                    "concepts": erasure.concepts,
                    "sites": f"{len(facts['sites'])} layers",
                    **{name: facts[name] for name in SHOWN_FACTS},
                },
            ),
            Section(
                "Guarantees and proof by run",
                table=[{"check": name.replace("`", ""), "measured": finding} for name, finding in checks],
            ),
            Section(f"{', '.join(settings.concepts)}, forgotten", pairs=pairs[:limit]),
            Section("Other artists", pairs=pairs[limit : 2 * limit]),
            Section("No artist", pairs=pairs[2 * limit :]),
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


def _csv_rows(settings: Settings, result: Result) -> list[dict[str, object]]:
    return [
        {
            "method": "more",
            "forget": JOINT.join(settings.concepts),
            "group": row.group,
            "case_number": i,
            "prompt": row.prompt,
            "evaluation_seed": row.seed,
            "artist": row.artist,
            "thing": row.thing,
            "lpips": round(lpips, 6),
        }
        for i, (row, lpips) in enumerate(zip(result.rows, result.lpips.tolist(), strict=True))
    ]


def _picture(settings: Settings, result: Result) -> Image.Image:
    """Up to two strips per group: before above after, and below them what the original draws as target."""
    forgotten = f"{', '.join(settings.concepts)}, forgotten"
    if result.target is not None:
        forgotten += f"; the target is {settings.targets[0]}"
    columns = min(COLUMNS, settings.limit)
    sheets = []
    for group, title in enumerate((forgotten, "Other artists", "No artist")):
        first = group * settings.limit
        # The labels need not say that all have no artist, or the one that the title names.
        same_artist = group == 2 or group == 0 and len(settings.concepts) == 1
        for start in range(first, first + min(settings.limit, 2 * columns), columns):
            end = min(start + columns, first + settings.limit)
            strips = {"before": result.before[start:end], "after": result.after[start:end]}
            if group == 0 and result.target is not None:
                strips["target"] = result.target[start:end]
            rows = result.rows[start:end]
            # Short strips keep their width, so that the columns of all strips are in line.
            blank = [None] * (columns - len(rows))
            sheets.append(
                draw_grid(
                    {label: [*map(to_pil, images), *blank] for label, images in strips.items()},
                    column_labels=[row.thing if same_artist else f"{row.thing} {row.artist}" for row in rows],
                    scale=2,
                    title=title if start == first else "",
                )
            )
    return stack(sheets)
