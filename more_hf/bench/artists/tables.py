"""What a benchmark leaves for its readers: rows.csv, summary.csv, table.md, report.html, grid.png, methods.png. All of it from the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.files import write_text
from ...core.markdown import markdown_table, number
from ..columns import write_rows
from .gallery import write_report
from .ranking import rank, winner
from .sheets import write_grid, write_methods
from .store import ORIGINAL, BenchmarkError, collect_rows, read_config
from .summary import POOLED, ROW_TYPES, read_rows, summarise


# which way is better; the arrows of every table come from here, and what is not here has none
BETTER = {
    "lpips_f": "up",
    "lpips_r": "down",
    "lpips_d": "up",
    "lpips_64_rece_f": "up",
    "lpips_64_rece_r": "down",
    "lpips_64_rece_d": "up",
    "lpips_r_group": "down",
    "lpips_named": "down",
    "lpips_unnamed": "down",
    "lpips_none": "down",
    "style_f": "down",
    "style_r": "up",
    "content_f": "up",
    "content_r": "up",
    "content_none": "up",
}
ARROWS = {"up": "↑", "down": "↓"}
PAPER = ("lpips_f", "lpips_r", "lpips_d")
ARTISTS_A_TABLE = 2  # as many erasures stand side by side, as in the paper
JUDGED = ("style_f", "content_f", "style_r", "content_r")
SHORT = ("method", "forget", "remap_to", "n_f", "n_r", "style_f", "content_f", "style_r", "content_r", "lpips_f", "lpips_r", "lpips_d")


def write_config(output: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`, whole or not at all."""
    write_text(output / "config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def rebuild(output: str | Path) -> list[dict[str, Any]]:
    """Write all tables and pages of a benchmark's folder again from its rows, without generating; return the summary.

    Where the pictures are there, rows come from the JSON files beside them, so that an unfinished run can be looked at; else from
    `rows.csv`. Raises `BenchmarkError` if the folder has neither.
    """
    output = Path(output)
    config = read_config(output)
    if config is None:
        raise BenchmarkError(f"{output} has no config.json: it is not the folder of a benchmark.")
    if (output / "images").is_dir():
        return write_outputs(output, config, collect_rows(output, config))
    if not (output / "rows.csv").is_file():
        raise BenchmarkError(f"{output} has neither images nor rows.csv, so there is nothing to make tables from.")
    return write_outputs(output, config, read_rows(output / "rows.csv"))


def write_outputs(output: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write everything but the configuration; the page and the pictures only where the images are. Return the summary."""
    if not rows:
        raise BenchmarkError(f"{output} has no completed row yet. Run the same `bench artists` command again.")
    summary = summarise(rows, confusion=config["judge_facts"].get("confusion"))
    write_rows(output / "rows.csv", [{column: row[column] for column in ROW_TYPES} for row in rows])
    write_rows(output / "summary.csv", summary)
    write_text(output / "table.md", tables(config, summary, rank(rows)) + "\n")
    if (output / "images").is_dir():
        write_report(output / "report.html", output / "images", config, rows, summary, short_table(summary))
        write_grid(output / "grid.png", output / "images", rows)
        write_methods(output / "methods.png", output / "images", rows)
    return summary


def tables(config: Mapping[str, Any], summary: Sequence[Mapping[str, Any]], ranking: Sequence[Mapping[str, Any]]) -> str:
    """`table.md`: who wins, the paper's layout, the judges' columns, the parts of "remain", the judges themselves, what made it."""
    parts = [f"**Who wins?** {winner(ranking)}", markdown_table(_ranking_table(ranking))] if ranking else []
    parts += [paper_tables(summary)]
    parts += ["**Is the style gone, is the rest still there?** In percent, before → after.", short_markdown(summary)]
    remain = ("method", "forget", "lpips_r", "lpips_r_group", "lpips_named", "lpips_unnamed", "lpips_none")
    parts += [
        "**LPIPS of what stays**, with 95 % bootstrap intervals over prompts: all other artists, those of the same group, those that the "
        "erasure named (targets, retain list), those it never named, and prompts without an artist.",
        markdown_table(_cells(summary, remain)),
    ]
    if any(line["style_r_change"] is not None for line in summary):
        parts += [
            "**What stays, after minus before**, in points, with paired 95 % intervals. `style_f_real` is how often the judge takes real "
            "images of the targets for the forgotten artist: `style_f` cannot be expected below it.",
            markdown_table(_changes(summary)),
        ]
    cost = ("method", "forget", "seconds_prepare", "seconds_per_image", "peak_memory")
    parts += ["**Cost**: seconds, and MiB while the method works.", markdown_table(_cells(summary, cost))]
    if config["judge_facts"]:
        parts += [
            "**The judges**, in percent: what they recognise on real images that they were not fitted on, as they are and (in brackets) "
            "after the pipeline's VAE. What they recognise on the unedited pipeline's pictures stands before each arrow above.",
            markdown_table(_judge_table(config["judge_facts"])),
        ]
    return "\n\n".join([*parts, _made_with(config, summary)])


def paper_tables(summary: Sequence[Mapping[str, Any]]) -> str:
    """Methods as rows; LPIPS of forgotten, remaining and their difference as columns, a few erasures side by side; best in bold.

    Of larger pictures the distances at 64 pixels are shown, without antialias, as in the published tables.
    """
    small = all(line[column] == line[column.replace("lpips", "lpips_64_rece")] for line in summary for column in PAPER)
    columns = PAPER if small else tuple(column.replace("lpips", "lpips_64_rece") for column in PAPER)
    methods = list(dict.fromkeys(line["method"] for line in summary))
    forgotten = list(dict.fromkeys(line["forget"] for line in summary))
    cell = {(line["method"], line["forget"]): line for line in _cells(summary, ("method", "forget", *columns))}
    made = []
    for start in range(0, len(forgotten), ARTISTS_A_TABLE):
        rows = []
        for method in methods:
            row = {"method": method}
            for forget in forgotten[start : start + ARTISTS_A_TABLE]:
                line = cell.get((method, forget), {})
                name = "all erasures" if forget == POOLED else forget
                row.update({f"{name} {column}": line.get(column, "") for column in map(_header, columns)})
            rows.append(row)
        made.append(markdown_table(rows))
    return "\n\n".join(made)


def short_table(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per method and erasure with the columns that answer "did it work?"."""
    lines = _cells(summary, SHORT, intervals=False)
    for line, numbers in zip(lines, summary, strict=True):
        for column in JUDGED:
            before = numbers[f"{column}_before"]
            if before is not None:
                line[_header(column)] = f"{before:.1f} → {line[_header(column)]}"
    return lines


def short_markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """`short_table` as text."""
    return markdown_table(short_table(summary))


def _cells(summary: Sequence[Mapping[str, Any]], columns: Sequence[str], *, intervals: bool = True) -> list[dict[str, Any]]:
    """Texts of numbers, with intervals, the best of several methods in bold."""
    lines = []
    for line in summary:
        rivals = [other for other in summary if other["forget"] == line["forget"] and other["method"] != ORIGINAL]
        texts = {}
        for column in columns:
            value = line[column]
            if column not in BETTER:
                texts[column] = value
                continue
            text = "" if value is None else number(value) if column.startswith("lpips") else f"{value:.1f}"
            values = [other[column] for other in rivals if other[column] is not None]
            best = values and (max if BETTER[column] == "up" else min)(values)
            if len(rivals) > 1 and line["method"] != ORIGINAL and value == best:
                text = f"**{text}**"
            if intervals and value is not None:
                text += f" [{line[f'{column}_low']:.3f}, {line[f'{column}_high']:.3f}]"
            texts[_header(column)] = text
        lines.append(texts)
    return lines


def _ranking_table(ranking: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    first = ranking[0]
    return [
        {
            "method": line["method"],
            "qualifies": line["qualifies"],
            _header("style_f"): f"{line['style_f']:.1f}",
            _header("content_f"): f"{line['content_f_before']:.1f} → {line['content_f']:.1f}",
            **{_header(column): line[column] for column in PAPER},
            f"lpips_d behind {first['method']}": ""
            if line is first
            else f"{line['behind']:+.3f} [{line['behind_low']:+.3f}, {line['behind_high']:+.3f}]",
        }
        for line in ranking
    ]


def _header(column: str) -> str:
    return f"{column} {ARROWS[BETTER[column]]}" if column in BETTER else column


def _changes(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for line in summary:
        texts = {"method": line["method"], "forget": line["forget"]}
        for column in ("style_r_change", "content_r_change", "content_none_change"):
            value, low, high = (line[f"{column}{end}"] for end in ("", "_low", "_high"))
            texts[column] = "" if value is None else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append({**texts, "style_f_real": line["style_f_real"]})
    return lines


def _judge_table(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "artist": artist,
            "artist recognised": f"{facts['artist_accuracy'][artist]} ({facts['artist_accuracy_vae'][artist]})",
            "thing recognised": f"{facts['thing_accuracy'][artist]} ({facts['thing_accuracy_vae'][artist]})",
            "most often mistaken for": _mistaken_for(facts["confusion"][artist], artist),
        }
        for artist in facts["artist_accuracy"]
    ]


def _mistaken_for(row: Mapping[str, float], artist: str) -> str:
    other, share = max(((name, share) for name, share in row.items() if name != artist), key=lambda pair: pair[1])
    return f"{other} ({share:.0f} %)"


def _made_with(config: Mapping[str, Any], summary: Sequence[Mapping[str, Any]]) -> str:
    generation, run = config["generation"], config["runs"][-1]
    sizes = {f"{line['n_f']} + {line['n_r']}" for line in summary if line["forget"] != POOLED}
    targets = "; ".join(f"{name} → {', '.join(asked['remap_to'] or ['nothing'])}" for name, asked in config["forget"].items())
    facts = [
        f"model `{config['model']}`, weights sha256 {generation['weights'][:16]}, {generation['dtype']} on {generation['device']}",
        f"{generation['scheduler']['class']}, {generation['steps']} steps, guidance {generation['guidance']:g}",
        f"prompts {generation['prompts']}, sha256 {generation['prompts_sha256'][:16]}; {config['seeds']} seed(s) a prompt of the forgotten "
        f"artist; images per line (forgotten + other artists): {', '.join(sorted(sizes))}",
        f"{config['lpips']}; intervals: 95 % bootstrap over prompts",
        f"judges: {config['judges'] or 'none'}",
        f"targets: {targets}",
        f"{run['hardware']}, {run['processes']} process(es); "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + f", more_hf {config['more_hf']}",
        *(f"`{command}`" for command in dict.fromkeys(run["command"] for run in config["runs"])),
    ]
    return "\n".join(f"- {fact}" for fact in facts)
