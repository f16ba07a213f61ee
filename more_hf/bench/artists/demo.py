"""Erase one artist from the embedded pipeline and show what changed and what did not."""

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

import more_hf
from more_hf.bench.artists.images import generate, grid, lpips_distance, stack, to_pil
from more_hf.bench.columns import write_rows
from more_hf.bench.page import Pair, Section, write_page
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.data import EMOJI_ARTISTS, load_emoji_sd


THINGS = (
    "cat face", "rocket", "pizza", "sunflower", "house", "guitar", "crab", "bicycle", "red heart",
    "mushroom", "crown", "balloon", "cactus", "penguin", "bus", "umbrella", "strawberry", "fish",
)  # fmt: skip
COLUMNS = 9  # of the picture: one per artist that stays


@dataclass(frozen=True)
class Row:
    """One prompt of the demo. `artist` is empty where the prompt names none."""

    group: str
    thing: str
    artist: str
    seed: int

    @property
    def prompt(self) -> str:
        return f"a {self.thing} in the style of {self.artist}" if self.artist else f"a {self.thing}"


def demo_rows(concept: str, *, limit: int, seed: int) -> list[Row]:
    """
    List the prompts: `limit` of the forgotten artist, of the others in turn, and without an artist, in this order.
    Every prompt has a seed of its own, counted up from `seed`.
    """
    others = [artist for artist in EMOJI_ARTISTS if artist != concept]
    rows = [("forget", THINGS[i % len(THINGS)], concept) for i in range(limit)]
    rows += [("remain", THINGS[i // len(others) % len(THINGS)], others[i % len(others)]) for i in range(limit)]
    rows += [("no artist", THINGS[i % len(THINGS)], "") for i in range(limit)]
    return [Row(*row, seed + i) for i, row in enumerate(rows)]


def run_demo(
    concept: str,
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
    Run the demo: generate, erase, generate again, print a table, and write `before_after.png`, `rows.csv`, `table.md`
    and `report.html` into `output`.

    Args:
        concept (`str`):
            The artist to erase, one of `EMOJI_ARTISTS`.
        remap_to (`list[str]`, *optional*):
            The artists it is sent to; `None` erases without remapping.
        limit (`int`):
            Prompts in each of the three groups.
        steps, guidance, seed, batch_size:
            As in [`~more_hf.bench.artists.images.generate`]; `seed` is the first row's.
        output (`Path`):
            The folder to write to; created if need be.
    """
    rows = demo_rows(concept, limit=limit, seed=seed)
    prompts, seeds = [row.prompt for row in rows], [row.seed for row in rows]
    settings = {"steps": steps, "guidance": guidance, "batch_size": batch_size}

    pipe = load_emoji_sd()
    before = generate(pipe, prompts, seeds, **settings, desc="before")
    asked = None
    if remap_to is not None and len(remap_to) == 1:
        # With one target there is a right answer: what the original draws when it is asked for the target.
        wanted = [replace(row, artist=remap_to[0]).prompt for row in rows[:limit]]
        asked = generate(pipe, wanted, seeds[:limit], **settings, desc="target")
    more_hf.erase_concept(pipe, concept, remap_to=remap_to)
    after = generate(pipe, prompts, seeds, **settings, desc="after")
    erasure = more_hf.get_erasure(pipe)

    moved = lpips_distance(before, after)
    lpips_f, lpips_r, lpips_no_artist = (group.mean().item() for group in moved.split(limit))
    summary = {
        "method": "more",
        "forget": concept,
        "remap_to": ", ".join(remap_to or ["none"]),
        "n_f": limit,
        "n_r": limit,
        "lpips_f": lpips_f,
        "lpips_r": lpips_r,
        "lpips_d": lpips_f - lpips_r,
        "lpips_no_artist": lpips_no_artist,
    }
    explanation = _EXPLANATION
    if asked is not None:
        summary["lpips_to_target_before"] = lpips_distance(before[:limit], asked).mean().item()
        summary["lpips_to_target"] = lpips_distance(after[:limit], asked).mean().item()
        explanation += _TARGET_EXPLANATION
    facts = erasure.to_dict()
    done = {"concepts": erasure.concepts, "sites": f"{len(facts['sites'])} layers"}
    done.update({name: facts[name] for name in _FACTS})
    measured = [{"check": name, "measured": value} for name, value in {**facts["guarantees"], **facts["proof"]}.items()]
    origin = {
        "command": f"more-hf demo --concept {concept!r} --remap_to {' '.join(map(repr, remap_to or ['none']))} "
        f"--limit {limit} --steps {steps} --guidance {guidance:g} --seed {seed}",
        "pipeline": f"emoji-sd, {type(pipe.scheduler).__name__}, {after.shape[3]} x {after.shape[2]} pixels",
        "LPIPS": "alex 0.1, no resize",
        "versions": [f"more_hf {more_hf.__version__}"] + [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")],
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }
    made_with = "; ".join(value if isinstance(value, str) else ", ".join(value) for value in origin.values())
    text = "\n\n".join([markdown_table([summary]), explanation, f"Made with {made_with}.", erasure.to_markdown()])

    output.mkdir(parents=True, exist_ok=True)
    _picture(rows, before, after, asked, limit, remap_to).save(output / "before_after.png")
    write_rows(output / "rows.csv", [_csv_row(i, row, concept, moved[i].item()) for i, row in enumerate(rows)])
    write_text(output / "table.md", f"{text}\n")
    pairs = [Pair(to_pil(before[i]), to_pil(after[i]), row.prompt, moved[i].item()) for i, row in enumerate(rows)]
    write_page(
        output / "report.html",
        title=f"{concept} erased",
        intro=f"Embedded pipeline, {len(rows)} prompts before and after, {steps} steps, guidance {guidance:g}, seeds "
        f"{seeds[0]} to {seeds[-1]}, each pair from the same noise. {explanation}",
        sections=[
            Section("How far the pictures moved", table=[summary], facts=origin),
            Section("What was done", facts=done),
            Section("Guarantees and proof by run", table=measured),
            Section(f"{concept}, forgotten", pairs=pairs[:limit]),
            Section("Other artists", pairs=pairs[limit : 2 * limit]),
            Section("No artist", pairs=pairs[2 * limit :]),
        ],
    )
    print(f"\n{text}\n")
    print(f"Open {output / 'before_after.png'} and {output / 'report.html'}; numbers are in {output / 'rows.csv'}.")


_FACTS = (
    "remap_to", "retain", "tokens", "solver", "solver_reason", "rank", "num_experts", "router", "condition_number",
    "leaks", "base", "fingerprint",
)  # fmt: skip
_EXPLANATION = (
    "LPIPS is the distance between a picture before and after: lpips_f of the forgotten artist should be large, "
    "lpips_r of the others and lpips_no_artist small; lpips_d = lpips_f - lpips_r."
)
_TARGET_EXPLANATION = (
    " Noise would score well, too, so lpips_to_target compares the forgotten artist's pictures after, and "
    "lpips_to_target_before those before, with what the original draws when it is asked for the target."
)


def _csv_row(case_number: int, row: Row, concept: str, lpips: float) -> dict[str, object]:
    return {
        "method": "more",
        "forget": concept,
        "group": row.group,
        "case_number": case_number,
        "prompt": row.prompt,
        "evaluation_seed": row.seed,
        "artist": row.artist,
        "thing": row.thing,
        "lpips": round(lpips, 6),
    }


def _picture(rows, before, after, asked, limit, remap_to):
    """Up to two strips per group: before above after, and below them what the target's prompt gives."""
    forgotten = f"{rows[0].artist}, forgotten" + (f"; the target is {remap_to[0]}" if asked is not None else "")
    sheets = []
    for group, start in (("forget", 0), ("remain", limit), ("no artist", 2 * limit)):
        title = {"forget": forgotten, "remain": "Other artists", "no artist": "No artist"}[group]
        for offset in range(start, start + min(limit, 2 * COLUMNS), COLUMNS):
            part = slice(offset, min(offset + COLUMNS, start + limit))
            shown, images = rows[part], [before[part], after[part]]
            labels = ["before", "after"]
            if group == "forget" and asked is not None:
                images.append(asked[part])
                labels.append("target")
            # Short strips keep their width, so that the columns of all strips are in line.
            blank = before.new_full((COLUMNS - len(shown), *before.shape[1:]), 255)
            sheets.append(
                grid(
                    torch.cat([image for strip in images for image in (strip, blank)]),
                    columns=COLUMNS,
                    row_labels=labels,
                    column_labels=[f"{r.thing} {r.artist if group == 'remain' else ''}" for r in shown],
                    scale=2,
                    title=title if offset == start else "",
                )
            )
    return stack(sheets)
