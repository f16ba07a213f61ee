"""Everything that a benchmark of artists writes for its readers, made from its rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table

from ..columns import Column, write_rows
from ..errors import BenchmarkError
from ..methods.registry import DIFFUSION
from ..page import Section
from ..tables import compare, made_with
from .cells import collect_rows
from .config import ArtistsConfig
from .findings import finding
from .gallery import write_report
from .grid import write_grid, write_methods, write_words
from .kinds import ARTISTS, THINGS, Kind
from .levels import LevelLine, left_table, level_lines, level_rows, lost_table, moved_table, write_levels_plot
from .ranking import RankedMethod, rank, winner
from .rows import Row, read_rows
from .sizes import rank_sizes, size_rows, write_sizes_plot
from .summary import COLUMNS, POOLED, summarise


ARTISTS_A_TABLE = 2  # erasures side by side, as in the paper
PAPER = ("lpips_f", "lpips_r", "lpips_d")
JUDGED = ("style_f", "content_f", "style_r", "content_r")
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

# What the columns of the page's table are, in plain words.
WORDS = {
    "forget": "erased",
    "remap_to": "sent to",
    "n_f": "its pictures",
    "n_r": "others",
    "style_f": "forgotten style recognised, %",
    "content_f": "its things recognised, %",
    "style_r": "other styles recognised, %",
    "content_r": "their things recognised, %",
    "lpips_f": "forgotten artist moved",
    "lpips_r": "others moved",
    "lpips_d": "difference",
}
WORDS_OF = {
    ARTISTS.name: WORDS,
    THINGS.name: {
        **WORDS,
        "style_f": "the artist's style recognised, %",
        "content_f": "forgotten thing recognised, %",
        "style_r": "others: style recognised, %",
        "content_r": "others: thing recognised, %",
        "lpips_f": "forgotten thing moved",
    },
}
CONTROLS = [name for name, method in DIFFUSION.items() if method.role == "control"]

Line = Mapping[str, Any]  # of `summary.csv`


def rebuild(output: str | Path) -> list[dict[str, Any]]:
    """
    Write all tables and pages of a benchmark's folder again from its rows, without generating.

    If the folder has the pictures, the rows come from the JSON files next to them, which also shows an
    unfinished run; otherwise they come from `rows.csv`.

    Returns:
        `list[dict[str, Any]]`: the lines of `summary.csv`.

    Raises:
        BenchmarkError: the folder has neither.
    """
    output = Path(output)
    config = ArtistsConfig.read(output)
    if config is None:
        raise BenchmarkError(f"{output} has no config.json. Name the folder of a benchmark.")
    if (output / "images").is_dir():
        return write_outputs(output, config, collect_rows(output, config))
    if not (output / "rows.csv").is_file():
        raise BenchmarkError(
            f"{output} has neither images nor rows.csv, so there is nothing to make tables from. Run the "
            "same `bench artists` command again."
        )
    return write_outputs(output, config, read_rows(output / "rows.csv", config))


def write_outputs(output: Path, config: ArtistsConfig, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """
    Write everything except the configuration, page and pictures only if there are images. Return the summary.
    """
    if not rows:
        raise BenchmarkError(
            f"{output} has no completed row yet. Run the same `bench artists` command again."
        )
    summary = summarise(rows, confusion=config.judge_facts.get("confusion"))
    write_rows(output / "rows.csv", [row.cells for row in rows])
    write_rows(output / "summary.csv", summary)
    ranking, sizes, kind = rank(rows), rank_sizes(rows), config.of_kind
    levels = level_lines(rows)
    write_text(output / "table.md", tables(config, summary, ranking, sizes, levels) + "\n")
    if len(sizes) > 1:
        write_rows(output / "sizes.csv", size_rows(sizes))
        write_sizes_plot(output / "sizes.png", sizes, kind)
    if levels:
        write_rows(output / "levels.csv", level_rows(levels))
        write_levels_plot(output / "levels.png", levels, kind)
    images = output / "images"
    if images.is_dir():
        write_report(
            output / "report.html",
            images,
            config,
            rows,
            finding=finding(summary, ranking, kind),
            tables=_page_tables(summary, ranking, kind),
        )
        write_grid(output / "grid.webp", images, rows)
        write_methods(output / "methods.webp", images, rows)
        write_words(output / "words.webp", images, rows)
    return summary


def tables(
    config: ArtistsConfig,
    summary: Sequence[Line],
    ranking: Sequence[RankedMethod],
    sizes: Mapping[int, Sequence[RankedMethod]],
    levels: Sequence[LevelLine],
) -> str:
    """
    `table.md`: the finding, the levels of wording, the ranking, LPIPS as in the paper, what the judges see,
    what stays, the cost, the number of names at once, the judges, and how it was made.
    """
    kind = config.of_kind
    parts = [finding(summary, ranking, kind)]
    if levels:
        parts += [LEFT_NOTE.format(kind.name), markdown_table(left_table(levels))]
        parts += [LOST_NOTE.format(kind.one), markdown_table(lost_table(levels))]
        parts += [MOVED_NOTE, markdown_table(moved_table(levels))]
    if ranking:
        parts += [f"**Who wins?** {winner(ranking, kind)}", markdown_table(_ranking_table(ranking, kind))]
    parts.append(paper_tables(summary))
    parts += [JUDGED_NOTE, short_markdown(summary, kind)]
    remain = _compared(summary, ("method", "forget"), REMAIN, interval_decimals=3)
    parts += [REMAIN_NOTE, markdown_table(remain)]
    if any(line["style_r_change"] is not None for line in summary):
        parts += [CHANGES_NOTE, markdown_table(_changes(summary))]
    parts += [COST_NOTE, markdown_table(summary, ("method", "forget", *COST))]
    if len(sizes) > 1:
        parts += [SIZES_NOTE.format(kind.name), markdown_table(_sizes_table(sizes, kind))]
    if config.judge_facts:
        parts += [JUDGES_NOTE, markdown_table(_judge_table(config.judge_facts))]
    return "\n\n".join([*parts, _made_with(config, summary)])


def _page_tables(summary: Sequence[Line], ranking: Sequence[RankedMethod], kind: Kind) -> list[Section]:
    """The page's sections: the winner, and a line per method; single erasures are in the linked files."""
    pooled = [line for line in summary if line["forget"] == POOLED]
    sections = []
    if ranking:
        table = _ranking_table(ranking, kind)
        sections.append(Section("Who wins?", winner(ranking, kind), table=table, words=WORDS_OF[kind.name]))
    return [
        *sections,
        Section(
            "Did it work?",
            "Percentages are before → after. LPIPS says how far a picture moved. Bold is the best method.",
            table=short_table(pooled or summary, kind),
            words=WORDS_OF[kind.name],
            files=("table.md", "summary.csv", "rows.csv"),
        ),
    ]


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
    rows = _compared(summary, ("method", "forget", "remap_to", "n_f", "n_r"), (*JUDGED, *PAPER), kind=kind)
    for row, line in zip(rows, summary, strict=True):
        for column in JUDGED:
            before, header = line[f"{column}_before"], _column(column, kind).header
            if before is not None:
                row[header] = replace(row[header], prefix=f"{before:.1f} → ")
    return rows


def short_markdown(summary: Sequence[Line], kind: Kind = ARTISTS) -> str:
    """`short_table` as text, which the command prints."""
    return markdown_table(short_table(summary, kind))


def _column(name: str, kind: Kind = ARTISTS) -> Column:
    """A column of the summary; the kind decides which way is better for the forgotten pictures."""
    better = {f"{kind.gone}_f": "down", f"{kind.kept}_f": "up"}
    return replace(COLUMNS[name], better=better.get(name, COLUMNS[name].better))


def _compared(
    summary: Sequence[Line],
    labels: Sequence[str],
    columns: Sequence[str],
    *,
    kind: Kind = ARTISTS,
    interval_decimals: int | None = None,
) -> list[dict[str, Any]]:
    return compare(
        summary,
        labels,
        [_column(column, kind) for column in columns],
        references=CONTROLS,
        decimals=1,
        interval_decimals=interval_decimals,
    )


def _ranking_table(ranking: Sequence[RankedMethod], kind: Kind) -> list[dict[str, Any]]:
    first = ranking[0]
    gone = f"{kind.gone}_f"
    spared = f"{kind.kept}_f" if kind.spared == "f" else f"{kind.gone}_r"
    return [
        {
            "method": line.method,
            "qualifies": line.qualifies,
            _column(gone, kind).header: f"{line.gone_f:.1f}",
            _column(spared, kind).header: _spared(line, kind),
            COLUMNS["lpips_f"].header: line.lpips_f,
            COLUMNS["lpips_r"].header: line.lpips_r,
            COLUMNS["lpips_d"].header: line.lpips_d,
            f"lpips_d behind {first.method}": "" if line is first else _behind(line),
        }
        for line in ranking
    ]


def _spared(line: RankedMethod, kind: Kind) -> str:
    if kind.spared == "f":
        return _change(line.kept_f_before, line.kept_f)
    return _change(line.gone_r_before, line.gone_r)


def _change(before: float | None, after: float | None) -> str:
    return " → ".join("" if value is None else f"{value:.1f}" for value in (before, after))


def _behind(line: RankedMethod) -> str:
    return f"{line.behind:+.3f} [{line.behind_low:+.3f}, {line.behind_high:+.3f}]"


def _sizes_table(sizes: Mapping[int, Sequence[RankedMethod]], kind: Kind) -> list[dict[str, Any]]:
    gone, kept, rest = (
        _column(name, kind).header for name in (f"{kind.gone}_f", f"{kind.kept}_f", f"{kind.gone}_r")
    )
    rows = []
    for size, ranking in sizes.items():
        for line in ranking:
            rows.append(
                {
                    "at once": size,
                    "method": line.method,
                    "qualifies": line.qualifies,
                    gone: _change(line.gone_f_before, line.gone_f),
                    kept: _change(line.kept_f_before, line.kept_f),
                    rest: _change(line.gone_r_before, line.gone_r),
                    COLUMNS["lpips_f"].header: line.lpips_f,
                    COLUMNS["lpips_r"].header: line.lpips_r,
                    COLUMNS["lpips_d"].header: line.lpips_d,
                    "behind": "the first" if line is ranking[0] else _behind(line),
                }
            )
    return rows


def _changes(summary: Sequence[Line]) -> list[dict[str, Any]]:
    rows = []
    for line in summary:
        row = {"method": line["method"], "forget": line["forget"]}
        for column in ("style_r_change", "content_r_change", "content_none_change"):
            value, low, high = (line[f"{column}{end}"] for end in ("", "_low", "_high"))
            row[column] = "" if value is None else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
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


def _made_with(config: ArtistsConfig, summary: Sequence[Line]) -> str:
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
