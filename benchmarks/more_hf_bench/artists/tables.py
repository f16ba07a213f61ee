"""Everything that a benchmark of artists writes for its readers, made from its rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table

from ..columns import Column, write_rows
from ..figures import write_lines
from ..methods.registry import DIFFUSION
from ..page import Section, write_page
from ..tables import POOLED, compare, made_with, measured_rows, pivot, with_interval
from .cells import collect_rows
from .config import ARTISTS, ArtistsConfig, Kind
from .findings import finding
from .grid import write_grids
from .ranking import contenders, level_lines, rank, rank_sizes, winner
from .rows import measured
from .summary import COLUMNS, summarise


ARTISTS_A_TABLE = 2  # erasures side by side, as in the paper
PAPER = ("lpips_f", "lpips_r", "lpips_d")
JUDGED = ("style_f", "content_f", "style_r", "content_r", "clip_f", "clip_r")
REMAIN = ("lpips_r", "lpips_r_group", "lpips_named", "lpips_unnamed", "lpips_none")
COST = ("seconds_prepare", "seconds_per_image", "peak_memory")

JUDGED_NOTE = "**Is the style gone, is the rest still there?** In percent, before → after."
REMAIN_NOTE = (
    "**LPIPS of what stays**, with 95 % bootstrap intervals over prompts: all other artists, those of the "
    "same group, those that the erasure named (targets, retain list), those it never named, and prompts "
    "without an artist."
)
CHANGES_NOTE = (
    "**What stays, after minus before**, in points, with paired 95 % intervals. `style_f_real` is how "
    "often the judge takes real images of the targets for the forgotten artist: `style_f` cannot be "
    "expected below it."
)
COST_NOTE = "**Cost**: seconds, and MiB while the method works."
SIZES_NOTE = (
    "**How many {} at once**, all erasures of a size together, on the pictures that every method has. `_f`: "
    "what was forgotten, `_r`: the rest, before → after. The last columns: how far `lpips_d` is behind the "
    "first method of the size that qualifies, with the paired 95 % interval."
)
LEFT_NOTE = (
    "**Asked in other words: what is left** of the forgotten {}, by level of the prompts, in percent of what "
    "is recognised before, with 95 % intervals; all erasures together, on the pictures that every method has."
)
LOST_NOTE = (
    "**Asked in other words: what the others lose** of what is recognised before, in percent; where prompts "
    "name no {}, of what else they ask for."
)
MOVED_NOTE = "**Asked in other words: LPIPS**, forgotten / others."
JUDGES_NOTE = (
    "**The judges**, in percent: what they recognise on real images that they were not fitted on, as they "
    "are and (in brackets) after the pipeline's VAE. What they recognise on the unedited pipeline's "
    "pictures stands before each arrow above."
)

PAGE_NOTE = "Percentages are before → after. LPIPS says how far a picture moved. Bold is the best method."
PICTURES_NOTE = (
    "The first prompt of each forgotten name: the original's picture, then every method's from the same "
    "noise. More are in grid.webp, all in the folder images."
)
# The panels of `sizes.png` and `levels.png`, over the number of names or the levels of wording.
PLOTS = {
    "sizes": {
        "gone_f": "forgotten {} recognized, %",
        "gone_r": "other {} recognized, %",
        "lpips_d": "LPIPS: forgotten moved − others moved",
    },
    "levels": {
        "left": "forgotten {}: still recognized, % of before",
        "lost": "others: no longer recognized, % of before",
        "lpips_r": "others: LPIPS before to after",
    },
}

# What the columns of the page's tables are, in plain words.
WORDS = {
    "forget": "erased",
    "remap_to": "sent to",
    "n_f": "its pictures",
    "n_r": "others",
    "style_f": "the forgotten: style recognised, %",
    "content_f": "the forgotten: thing recognised, %",
    "style_r": "others: style recognised, %",
    "content_r": "others: thing recognised, %",
    "clip_f": "the forgotten: CLIP score of the content",
    "clip_r": "others: CLIP score of the content",
    "lpips_f": "the forgotten moved",
    "lpips_r": "others moved",
    "lpips_d": "difference",
}
CONTROLS = [name for name, method in DIFFUSION.items() if method.role == "control"]

Line = Mapping[str, Any]  # of `summary.csv`


def write_outputs(output: Path, config: ArtistsConfig) -> list[dict[str, Any]]:
    """
    Write everything except the configuration, page and pictures only if there are images. Return the summary.
    """
    images, kind = output / "images", config.of_kind
    rows = measured_rows(output, "images", lambda: {"rows": collect_rows(output, config)})
    rows = measured(rows, config)
    summary = summarise(rows, confusion=config.judge_facts.get("confusion"))
    write_rows(output / "summary.csv", summary)
    ranking, sizes, levels = rank(rows, kind), rank_sizes(rows, kind), level_lines(rows, kind)
    write_text(output / "table.md", tables(config, summary, ranking, sizes, levels) + "\n")
    several = len({line["at_once"] for line in sizes}) > 1
    for name, lines, x in (("sizes", sizes if several else [], "at_once"), ("levels", levels, "level")):
        if lines:
            write_rows(output / f"{name}.csv", lines)
            methods = sorted(contenders(line["method"] for line in lines))
            titles = {column: title.format(kind.name) for column, title in PLOTS[name].items()}
            write_lines(output / f"{name}.png", lines, x, methods, titles)
    if images.is_dir():
        write_grids(output, images, rows)
        _write_page(output, config, summary, ranking)
    return summary


def tables(
    config: ArtistsConfig,
    summary: Sequence[Line],
    ranking: Sequence[Line],
    sizes: Sequence[Line],
    levels: Sequence[Line],
) -> str:
    """
    `table.md`: the finding, the levels of wording, the ranking, LPIPS as in the paper, what the judges see,
    what stays, the cost, the number of names at once, the judges, and how it was made.
    """
    kind = config.of_kind
    parts = [finding(summary, ranking, kind)]
    if levels:
        notes = (LEFT_NOTE.format(kind.name), LOST_NOTE.format(kind.one), MOVED_NOTE)
        for note, table in zip(notes, level_tables(levels), strict=True):
            parts += [note, markdown_table(table)]
    if ranking:
        parts += [f"**Who wins?** {winner(ranking, kind)}", markdown_table(_ranking_table(ranking, kind))]
    parts.append(paper_tables(summary))
    parts += [JUDGED_NOTE, short_markdown(summary, kind)]
    remain = _compared(summary, ("method", "forget"), REMAIN, interval_decimals=3)
    parts += [REMAIN_NOTE, markdown_table(remain)]
    if any(line["style_r_change"] is not None for line in summary):
        parts += [CHANGES_NOTE, markdown_table(_changes(summary))]
    parts += [COST_NOTE, markdown_table(summary, ("method", "forget", *COST))]
    if len({line["at_once"] for line in sizes}) > 1:
        parts += [SIZES_NOTE.format(kind.name), markdown_table(_sizes_table(sizes, kind))]
    if config.judge_facts:
        parts += [JUDGES_NOTE, markdown_table(_judge_table(config.judge_facts))]
    return "\n\n".join([*parts, "\n".join(f"- {fact}" for fact in _made_with(config, summary))])


def _write_page(
    output: Path, config: ArtistsConfig, summary: Sequence[Line], ranking: Sequence[Line]
) -> None:
    """The page: the winner, a line per method, and one prompt by every method; the rest is in the files."""
    kind = config.of_kind
    pooled = [line for line in summary if line["forget"] == POOLED]
    sections = []
    if ranking:
        sections.append(Section("Who wins?", winner(ranking, kind), _ranking_table(ranking, kind)))
    files = ("table.md", "summary.csv", "rows.csv", "grid.webp")
    sections.append(Section("Did it work?", PAGE_NOTE, short_table(pooled or summary, kind), files=files))
    pictures = {PICTURES_NOTE: path} if (path := output / "methods.webp").is_file() else {}
    sections.append(Section("Before and after", pictures=pictures))
    sections.append(Section("How it was made", facts=_made_with(config, summary), folded=True))
    write_page(
        output / "report.html",
        title=f"{kind.name.title()} erased: before and after",
        finding=finding(summary, ranking, kind),
        sections=sections,
        words=WORDS,
    )


def paper_tables(summary: Sequence[Line]) -> str:
    """
    Lay LPIPS out as in the paper: methods as rows, a few erasures side by side, best in bold. For larger
    pictures, the distances at 64 pixels without antialiasing are shown, as in the published tables.
    """
    resized = tuple(column.replace("lpips", "lpips_64_rece") for column in PAPER)
    is_small = all(line[a] == line[b] for line in summary for a, b in zip(PAPER, resized, strict=True))
    columns = PAPER if is_small else resized
    compared = _compared(summary, ("method", "forget"), columns, interval_decimals=3)
    cells = {(line["method"], line["forget"]): line for line in compared}
    methods = list(dict.fromkeys(line["method"] for line in summary))
    erasures = list(dict.fromkeys(line["forget"] for line in summary))
    tables = []
    for start in range(0, len(erasures), ARTISTS_A_TABLE):
        rows = {method: {"method": method} for method in methods}
        for forget, column in itertools.product(erasures[start : start + ARTISTS_A_TABLE], columns):
            name = "all erasures" if forget == POOLED else forget
            header = COLUMNS[column].header
            for method, row in rows.items():
                row[f"{name} {header}"] = cells.get((method, forget), {}).get(header, "")
        tables.append(markdown_table(list(rows.values())))
    return "\n\n".join(tables)


def short_table(summary: Sequence[Line], kind: Kind = ARTISTS) -> list[dict[str, Any]]:
    """One line per method and erasure with the columns that answer "did it work?"."""
    labels = ("method", "forget", "remap_to", "n_f", "n_r")
    return _compared(summary, labels, (*JUDGED, *PAPER), kind=kind, before=JUDGED)


def short_markdown(summary: Sequence[Line], kind: Kind = ARTISTS) -> str:
    """`short_table` as text, which the command prints."""
    return markdown_table(short_table(summary, kind))


def _column(name: str, kind: Kind = ARTISTS) -> Column:
    """A column of the summary; the kind decides which way is better for the forgotten pictures."""
    better = {f"{kind.gone}_f": "down", f"{kind.kept}_f": "up"}
    return replace(COLUMNS[name], better=better.get(name, COLUMNS[name].better))


def _compared(
    summary: Sequence[Line], labels: Sequence[str], columns: Sequence[str], *, kind: Kind = ARTISTS, **options
) -> list[dict[str, Any]]:
    numbers = [_column(column, kind) for column in columns]
    return compare(summary, labels, numbers, references=CONTROLS, decimals=1, **options)


def _ranking_table(ranking: Sequence[Line], kind: Kind) -> list[dict[str, Any]]:
    gone = _column(f"{kind.gone}_f", kind).header
    name, spared = (f"{kind.kept}_f", "kept_f") if kind.spared == "f" else (f"{kind.gone}_r", "gone_r")
    behind = f"lpips_d behind {ranking[0]['method']}"
    return [
        {
            "method": line["method"],
            "qualifies": line["qualifies"],
            gone: f"{line['gone_f']:.1f}",
            _column(name, kind).header: _change(line, spared),
            **{COLUMNS[column].header: line[column] for column in PAPER},
            behind: "" if line is ranking[0] else with_interval(line, "behind", "+.3f"),
        }
        for line in ranking
    ]


def _change(line: Line, name: str) -> str:
    values = (line[f"{name}_before"], line[name])
    return " → ".join("" if pd.isna(value) else f"{value:.1f}" for value in values)


def _sizes_table(sizes: Sequence[Line], kind: Kind) -> list[dict[str, Any]]:
    rows = []
    for size, ranking in itertools.groupby(sizes, lambda line: line["at_once"]):
        for place, line in enumerate(ranking):
            row = {"at once": size, "method": line["method"], "qualifies": line["qualifies"]}
            for name, column in (("gone_f", kind.gone), ("kept_f", kind.kept), ("gone_r", kind.gone)):
                row[_column(f"{column}{name[4:]}", kind).header] = _change(line, name)
            row |= {COLUMNS[column].header: line[column] for column in PAPER}
            rows.append({**row, "behind": with_interval(line, "behind", "+.3f") if place else "the first"})
    return rows


def level_tables(levels: Sequence[Line]) -> list[list[dict[str, Any]]]:
    """Methods by levels: `left` and `lost`, each below what is recognized before, and LPIPS."""
    tables = []
    for column, before in (("left", "gone_f_before"), ("lost", "shown_r_before")):
        cells = []
        for line in levels:
            if column == "lost" or line["n_f"]:
                recognized = "" if line[before] is None else f"{line[before]:.0f}"
                cells.append(("recognised before", line["level"], recognized))
                cells.append((line["method"], line["level"], with_interval(line, column, ".0f")))
        tables.append(_by_level(cells))
    moved = []
    for line in levels:
        both = ("" if line[name] is None else f"{line[name]:.3f}" for name in ("lpips_f", "lpips_r"))
        moved.append((line["method"], line["level"], " / ".join(both)))
    return [*tables, _by_level(moved)]


def _by_level(cells: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return pivot(pd.DataFrame(cells, columns=["method", "level", "cell"]), ["method"], "level")


def _changes(summary: Sequence[Line]) -> list[dict[str, Any]]:
    rows = []
    for line in summary:
        row = {"method": line["method"], "forget": line["forget"]}
        for column in ("style_r_change", "content_r_change", "content_none_change"):
            row[column] = with_interval(line, column, "+.1f")
        rows.append({**row, "style_f_real": line["style_f_real"]})
    return rows


def _judge_table(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "artist": artist,
            "artist recognised": f"{accuracy} ({facts['artist_accuracy_vae'][artist]})",
            "thing recognised": f"{facts['thing_accuracy'][artist]} ({facts['thing_accuracy_vae'][artist]})",
            "most often mistaken for": _mistaken_for(facts["confusion"][artist], artist),
        }
        for artist, accuracy in facts["artist_accuracy"].items()
    ]


def _mistaken_for(taken_for: Mapping[str, float], artist: str) -> str:
    others = {name: percent for name, percent in taken_for.items() if name != artist}
    most = max(others, key=others.get)
    return f"{most} ({others[most]:.0f} %)"


def _made_with(config: ArtistsConfig, summary: Sequence[Line]) -> list[str]:
    made = config.generation
    sizes = {f"{line['n_f']} + {line['n_r']}" for line in summary if line["forget"] != POOLED}
    facts = [
        f"model `{config.model}`, weights sha256 {made.weights[:16]}, {made.dtype} on {made.device}",
        config.generation_text,
        f"prompts {made.prompts}, sha256 {made.prompts_sha256[:16]}; {config.seeds} seed(s) a prompt of the "
        f"forgotten artist; images per line (forgotten + other artists): {', '.join(sorted(sizes))}",
        f"{config.lpips}; intervals: 95 % bootstrap over prompts",
        f"judges: {config.judges or 'none'}",
        f"targets: {'; '.join(config.targets_text)}",
    ]
    return made_with(config, facts)
