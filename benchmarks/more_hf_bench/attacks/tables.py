"""Everything made from the cells: rows.csv, summary.csv, table.md, recovery.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table, number

from ..columns import Column, read_rows, rounded, write_rows
from ..errors import BenchmarkError
from ..figures import panels, write_figure
from ..tables import made_with
from .registry import ATTACKS
from .result import AUC, RECOGNISED, mean_of
from .store import AttackConfig


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Row = Mapping[str, Any]

POOLED = "all"  # the `model` of lines over all models

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

HEADLINES = {
    RECOGNISED: (
        "What comes back",
        "Percent of the forgotten test samples or pictures that the attacker gets back, at the largest "
        "budget tried; mean over models, what was forgotten and runs.",
    ),
    AUC: (
        "What can be told apart",
        "The same attacks, without a prior: the probability in percent that a forgotten test sample scores "
        "above one of the others. 50 is chance.",
    ),
}


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
    rows = []
    for cell in config.cells(output):
        if cell.is_done:
            key = {column.name: getattr(cell, column.name) for column in KEYS}
            rows += [{**key, **result} for result in cell.read()]
    if not rows:
        raise BenchmarkError(
            f"{output} has no completed cell yet. Run the same `bench attacks` command again."
        )
    write_rows(output / "rows.csv", rows)
    return _write(output, config, rows)


def summarise(rows: Sequence[Row], references: Sequence[str]) -> list[dict[str, Any]]:
    """Summarise rows: a line for every model, method and number, its mean over `forget` and seeds; then one
    over all models, for the numbers that every model has.

    Beside it stands the same number of each reference, in a column with the reference's name. `runs` is how
    many rows a line is the mean of; where the attack did not get there in all of them, `recovered` is empty.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        for model in (row["model"], POOLED):
            groups.setdefault((model, row["method"], _number(row)), []).append(row)
    models = {row["model"] for row in rows}
    lines = []
    for (model, *_), group in sorted(groups.items(), key=lambda item: item[0][0] == POOLED):
        # One model alone needs no mean over models.
        if model != POOLED or (len(models) > 1 and {row["model"] for row in group} == models):
            lines.append(_line(model, group))
    found = {(line["method"], line["model"], _number(line)): line["recovered"] for line in lines}
    for line in lines:
        line |= {name: found.get((name, line["model"], _number(line))) for name in references}
    return lines


def _line(model: str, rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    line = {"attack": first["attack"], "variant": first["variant"], "model": model, "method": first["method"]}
    line |= {name: first[name] for name in ("measure", "unit", "budget")}
    line |= {"recovered": None, "low": None, "high": None}
    recovered = [row["recovered"] for row in rows]
    if None not in recovered:
        mean, low, high = mean_of(recovered, [row["n"] for row in rows])
        line |= rounded({"recovered": mean, "low": low, "high": high})
    return {**line, "runs": len(rows), "n": sum(row["n"] for row in rows)}


def _number(line: Row) -> tuple:
    return tuple(line[name] for name in NUMBER)


def short_markdown(summary: Sequence[Row]) -> str:
    """What the command prints: what comes back at the largest budgets, a column for each method."""
    lines = [line for line in largest_budgets(_main_lines(summary)) if line["measure"] == RECOGNISED]
    return markdown_table(method_columns(lines or summary))


def _main_lines(summary: Sequence[Row]) -> list[Row]:
    """The lines over all models, or those of the only one."""
    last = summary[-1]["model"]
    return [line for line in summary if line["model"] == last]


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
    """Recovery over budget: a panel for each attack with several budgets, a line for each method; `None`
    without any."""
    lines = [line for line in _main_lines(summary) if line["measure"] == RECOGNISED and line["unit"]]
    numbers: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for line in lines:
        panel = numbers.setdefault((line["attack"], line["variant"], line["unit"]), {})
        panel.setdefault(line["method"], []).append(line)
    numbers = {key: panel for key, panel in numbers.items() if max(map(len, panel.values())) > 1}
    if not numbers:
        return None
    figure, axes = panels(len(numbers), width=3.3, height=2.8, legend=0.6, sharey=True)
    methods = list(dict.fromkeys(line["method"] for line in lines))
    for axis, ((attack, variant, unit), panel) in zip(axes, numbers.items(), strict=True):
        for method, points in panel.items():
            i = methods.index(method)
            style = {"color": f"C{i % 10}", "marker": "osv^D"[i % 5], "markersize": 3}
            x, y = ([line[name] for line in points] for name in ("budget", "recovered"))
            axis.plot(x, y, label=method, **style)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks(x, [f"{budget:g}" for budget in x])
        axis.minorticks_off()
        axis.set_ylim(-3, 103)
        axis.set_title(f"{attack}: {variant}" if variant else attack, fontsize=9)
        axis.set_xlabel(unit, fontsize=9)
    handles = {}
    for axis in axes:
        drawn, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, drawn, strict=True))
    figure.supylabel("% of the forgotten recognised", fontsize=9)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=9
    )
    return figure


def _write(output: Path, config: AttackConfig, rows: Sequence[Row]) -> list[dict[str, Any]]:
    summary = summarise(rows, config.references)
    write_rows(output / "summary.csv", summary)
    parts = []
    for measure, (heading, note) in HEADLINES.items():
        lines = [line for line in largest_budgets(_main_lines(summary)) if line["measure"] == measure]
        if lines:
            parts.append(f"## {heading}\n\n{note}\n\n{markdown_table(method_columns(lines))}")
    for model in config.models:
        lines = [line for line in summary if line["model"] == model]
        if lines:
            parts.append(f"## {model}: every number\n\n{markdown_table(method_columns(lines))}")
    write_text(output / "table.md", "\n\n".join([*parts, made_with(config, _facts(config))]) + "\n")
    figure = recovery_figure(summary)
    if figure is not None:
        write_figure(output / "recovery.png", figure)
    return summary


def _facts(config: AttackConfig) -> list[str]:
    """The configuration in sentences, for table.md."""
    written = config.to_dict()
    evaluation = ", ".join(f"{name} {value}" for name, value in written["evaluation"].items())
    facts = [f"{evaluation}; {config.seeds} run(s) of each method; forgotten: {', '.join(config.forget)}"]
    for name, settings in written["attacks"].items():
        values = ", ".join(f"{key} {value}" for key, value in settings.items())
        facts.append(f"{name} (needs {ATTACKS[name].access}){': ' if values else ''}{values}")
    return facts
