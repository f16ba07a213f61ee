"""Everything made from the cells: rows.csv, summary.csv, table.md, recovery.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.files import replacing, write_text
from ...core.markdown import markdown_table, number
from ..columns import Column, read_rows, write_rows
from ..errors import BenchmarkError
from ..tables import made_with
from .registry import ATTACKS
from .result import RECOGNISED, mean_of
from .store import AttackConfig


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Row = Mapping[str, Any]

KEYS = [
    Column("attack", str),
    Column("model", str),
    Column("method", str),
    Column("forget", str),
    Column("seed", int),
]
RESULT = [
    Column("recovered"),
    Column("measure", str),
    Column("variant", str),
    Column("budget"),
    Column("unit", str),
    Column("n", int),
    Column("low"),
    Column("high"),
]
ROW_COLUMNS = [*KEYS, *RESULT]
NUMBER = ("attack", "variant", "measure", "unit", "budget")  # what one number of a victim is, in its rows

RECOGNISED_NOTE = (
    "Percent of the forgotten test samples or pictures that the attacker gets back, mean over what was "
    "forgotten and over runs, at the largest budget tried."
)


def rebuild(output: str | Path) -> list[dict[str, Any]]:
    """Write the tables and the picture of a folder again, from its cells or else from rows.csv.

    Returns:
        `list[dict]`: the lines of `summary.csv`.
    """
    output = Path(output)
    config = AttackConfig.read(output)
    if (output / "cells").is_dir() or not (output / "rows.csv").is_file():
        return write_outputs(output, config)
    return _write(output, config, read_rows(output / "rows.csv", ROW_COLUMNS))


def write_outputs(output: Path, config: AttackConfig) -> list[dict[str, Any]]:
    """Write everything but the configuration from the cells that are done.

    Returns:
        `list[dict]`: the lines of `summary.csv`.

    Raises:
        `BenchmarkError`: if no cell is done.
    """
    rows = [row for cell in config.cells(output) if cell.is_done for row in cell.read()]
    if not rows:
        raise BenchmarkError(
            f"{output} has no completed cell yet. Run the same `bench attacks` command again."
        )
    write_rows(output / "rows.csv", rows)
    return _write(output, config, rows)


def summarise(rows: Sequence[Row], references: Sequence[str]) -> list[dict[str, Any]]:
    """Summarise rows: a line for every model, method and number, its mean over `forget` and seeds.

    Beside it stands the same number of each reference, in a column with the reference's name. `runs` is how
    many rows a line is the mean of; where the attack did not get there in all of them, `recovered` is empty.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("model", "method", *NUMBER)), []).append(row)
    lines = []
    for group in groups.values():
        first = group[0]
        line = {name: first[name] for name in ("attack", "variant", "model", "method", *NUMBER[2:])}
        recovered = [row["recovered"] for row in group]
        line |= {"recovered": None, "low": None, "high": None}
        if None not in recovered:
            mean, low, high = mean_of(recovered, [row["n"] for row in group])
            line |= {"recovered": round(mean, 6), "low": round(low, 6), "high": round(high, 6)}
        lines.append({**line, "runs": len(group), "n": sum(row["n"] for row in group)})
    found = {(line["method"], line["model"], *_number(line)): line["recovered"] for line in lines}
    for line in lines:
        line |= {name: found.get((name, line["model"], *_number(line))) for name in references}
    return lines


def _number(line: Row) -> tuple:
    return tuple(line[name] for name in NUMBER)


def short_markdown(summary: Sequence[Row]) -> str:
    """What the command prints: for each model the numbers at their largest budget, a column per method."""
    parts = []
    for model in dict.fromkeys(line["model"] for line in summary):
        lines = [line for line in summary if line["model"] == model]
        parts.append(f"{model}\n\n{markdown_table(method_columns(largest_budgets(lines)))}")
    return "\n\n".join(parts)


def largest_budgets(summary: Sequence[Row]) -> list[Row]:
    """The lines at the largest budget of each number."""
    largest: dict[tuple, float] = {}
    for line in summary:
        key = _number(line)[:-1]
        largest[key] = max(largest.get(key, 0), line["budget"])
    return [line for line in summary if line["budget"] == largest[_number(line)[:-1]]]


def method_columns(lines: Sequence[Row]) -> list[dict[str, str]]:
    """Lay out the lines of one model: a row for each number, a column for each method."""
    rows: dict[tuple, dict[str, str]] = {}
    for line in lines:
        budget = f"{line['budget']:g} {line['unit']}".strip() if line["unit"] else ""
        label = {"attack": line["attack"], "variant": line["variant"], "budget": budget}
        row = rows.setdefault(_number(line), {**label, "measure": line["measure"]})
        row[line["method"]] = _cell(line["recovered"], is_percent=line["n"] > 0)
    return list(rows.values())


def _cell(value: float | None, *, is_percent: bool) -> str:
    """Percentages and whatever is above 1 with one decimal, smaller numbers with three digits."""
    return f"{value:.1f}" if value is not None and (is_percent or value > 1) else number(value)


def recovery_figure(summary: Sequence[Row]) -> Figure | None:
    """Recovery over budget: a row of panels for each model, one line a method; `None` without a curve."""
    from matplotlib.figure import Figure

    curves: dict[tuple[str, str, str], set[float]] = {}
    for line in summary:
        if line["measure"] == RECOGNISED and line["unit"]:
            key = line["attack"], line["variant"], line["unit"]
            curves.setdefault(key, set()).add(line["budget"])
    shown = [curve for curve, budgets in curves.items() if len(budgets) > 1]
    if not shown:
        return None
    models = list(dict.fromkeys(line["model"] for line in summary))
    methods = list(dict.fromkeys(line["method"] for line in summary))
    figure = Figure(figsize=(3.4 * len(shown), 2.9 * len(models) + 0.8), layout="constrained")
    axes = figure.subplots(len(models), len(shown), squeeze=False, sharey=True)
    for model, row in zip(models, axes, strict=True):
        for (attack, variant, unit), axis in zip(shown, row, strict=True):
            curve = {"attack": attack, "variant": variant, "unit": unit, "measure": RECOGNISED}
            for i, method in enumerate(methods):
                of = {**curve, "model": model, "method": method}
                points = [line for line in summary if of.items() <= line.items()]
                budgets = [line["budget"] for line in points]
                style = {"color": f"C{i % 10}", "marker": "osv^D"[i // 10], "markersize": 3}
                axis.plot(budgets, [line["recovered"] for line in points], label=method, **style)
            axis.set_xscale("symlog", linthresh=1)
            axis.set_title(f"{attack} {variant}\n{model}", fontsize=8)
            axis.set_xlabel(unit, fontsize=8)
        row[0].set_ylabel("% recovered", fontsize=8)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), fontsize=8)
    return figure


def _write(output: Path, config: AttackConfig, rows: Sequence[Row]) -> list[dict[str, Any]]:
    summary = summarise(rows, config.references)
    write_rows(output / "summary.csv", summary)
    parts = []
    for model in config.models:
        lines = [line for line in summary if line["model"] == model]
        largest = [line for line in largest_budgets(lines) if line["measure"] == RECOGNISED]
        if largest:
            table = markdown_table(method_columns(largest))
            parts.append(f"## {model}: what comes back\n\n{RECOGNISED_NOTE}\n\n{table}")
    for model in config.models:
        lines = [line for line in summary if line["model"] == model]
        if lines:
            parts.append(f"## {model}: every number\n\n{markdown_table(method_columns(lines))}")
    write_text(output / "table.md", "\n\n".join([*parts, made_with(config, _facts(config))]) + "\n")
    figure = recovery_figure(summary)
    if figure is not None:
        with replacing(output / "recovery.png") as draft:
            figure.savefig(draft, dpi=110, format="png")
    return summary


def _facts(config: AttackConfig) -> list[str]:
    """The configuration in sentences, for table.md."""
    evaluation = ", ".join(f"{name} {value}" for name, value in config.evaluation.items())
    facts = [f"{evaluation}; {config.seeds} run(s) of each method; forgotten: {', '.join(config.forget)}"]
    for name, settings in config.attacks.items():
        values = ", ".join(f"{key} {value}" for key, value in settings.items())
        facts.append(f"{name} (needs {ATTACKS[name].access}){': ' if values else ''}{values}")
    return facts
