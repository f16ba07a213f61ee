"""Everything made from the cells: rows.csv, summary.csv, table.md, recovery.png, report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import harmonic_mean
from typing import TYPE_CHECKING, Any

import pandas as pd

from more_hf.core.markdown import markdown_table, number

from ..columns import rounded, write_rows
from ..figures import legend_below, panels, write_figure
from ..page import Section, write_report
from ..tables import POOLED, made_with, measured_rows, pivot
from .registry import ATTACKS
from .store import AUC, LPIPS, RECOGNISED, AttackConfig, mean_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Line = Mapping[str, Any]  # of `summary.csv`

NUMBER = ["attack", "variant", "measure", "unit", "budget"]  # what one number of a victim is, in its rows

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
    LPIPS: (
        "How far pictures moved",
        "LPIPS: of `others` from the original's, what the others pay; else from the pictures looked for.",
    ),
}
VISIBLE = 0.15  # LPIPS between what two artists draw, below which a person hardly sees a difference
OF_WHAT_STAYED = ("never forgotten",)  # variants that attack something else
BALANCE = (
    "All in one number",
    "Of what the original draws by its name: forgetting is the share that is gone by name, robustness the "
    "share that is still gone under the strongest attack here, at its best budget. What remains is 1 − "
    f"LPIPS / {VISIBLE} of the others' pictures, not below 0, the mean of those that name another artist and "
    "those that name none. Last the harmonic mean of the three.",
)
FIGURE_NOTE = "What comes back over the attacker's budget, a panel for each attack with several budgets."


def summarise(rows: pd.DataFrame, references: Sequence[str]) -> list[dict[str, Any]]:
    """Summarise rows: a line for every model, method and number, its mean over `forget` and seeds; then one
    over all models, for the numbers that every model has.

    Beside it stands the same number of each reference, in a column with the reference's name. `runs` is how
    many rows a line is the mean of; where the attack did not get there in all of them, `recovered` is empty.
    """
    lines = [_line(part["model"].iloc[0], part) for _, part in _groups(rows, "model", "method")]
    models = rows["model"].nunique()
    # One model alone needs no mean over models.
    if models > 1:
        every = [part for _, part in _groups(rows, "method") if part["model"].nunique() == models]
        lines += [_line(POOLED, part) for part in every]
    found = {(line["method"], line["model"], *(line[name] for name in NUMBER)): line for line in lines}
    for line in lines:
        for name in references:
            reference = found.get((name, line["model"], *(line[key] for key in NUMBER)))
            line[name] = None if reference is None else reference["recovered"]
    return lines


def _groups(rows: pd.DataFrame, *keys: str):
    """The rows of each number, in the order of their first rows."""
    return rows.groupby([*keys, *NUMBER], sort=False)


def _line(model: str, rows: pd.DataFrame) -> dict[str, Any]:
    first = rows.iloc[0]
    line = {"attack": first["attack"], "variant": first["variant"], "model": model, "method": first["method"]}
    line |= {name: first[name] for name in ("measure", "unit", "budget")}
    line |= {"recovered": None, "low": None, "high": None}
    if rows["recovered"].notna().all():
        mean, low, high = mean_of(rows["recovered"].tolist(), rows["n"].tolist())
        line |= rounded({"recovered": mean, "low": low, "high": high})
    return {**line, "runs": len(rows), "n": int(rows["n"].sum())}


def short_markdown(summary: Sequence[Line]) -> str:
    """What the command prints: what comes back at the largest budgets, a column for each method."""
    lines = largest_budgets(_main_lines(summary))
    recognised = lines[lines["measure"] == RECOGNISED]
    return markdown_table(method_columns(pd.DataFrame(summary) if recognised.empty else recognised))


def _main_lines(summary: Sequence[Line]) -> pd.DataFrame:
    """The lines over all models, or those of the only one."""
    lines = pd.DataFrame(summary)
    return lines[lines["model"] == lines["model"].iloc[-1]]


def largest_budgets(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines at the largest budget of each number."""
    return lines[lines["budget"] == lines.groupby(NUMBER[:-1])["budget"].transform("max")]


def method_columns(lines: pd.DataFrame) -> list[dict[str, str]]:
    """Lay out the lines of one model: a row for each number, a column for each method."""
    budget = lines["budget"].map("{:g} ".format) + lines["unit"]
    cells = map(_cell, lines["recovered"], lines["n"] > 0)
    shown = lines.assign(spent=budget.where(lines["unit"] != "", ""), cell=list(cells))
    table = pivot(shown, [*NUMBER, "spent"], "method")
    labels = {"attack": "attack", "variant": "variant", "budget": "spent", "measure": "measure"}
    methods = shown["method"].unique()
    return [
        {name: row[key] for name, key in [*labels.items(), *zip(methods, methods, strict=True)]}
        for row in table
    ]


def _cell(value: float | None, is_percent: bool) -> str:
    """Percentages and whatever is above 1 with one decimal, smaller numbers with three digits."""
    if pd.isna(value):
        return ""
    return f"{value:.1f}" if is_percent or value > 1 else number(value)


def balance(lines: pd.DataFrame) -> list[dict[str, str]]:
    """
    A row for each method of one model: forgetting, robustness, what remains, and their harmonic mean, as
    `BALANCE` says; none without the attacks `name` and `others` and another one.

    Args:
        lines (`DataFrame`): lines of `summary.csv`.
    """
    counted = lines[(lines["measure"] == RECOGNISED) & ~lines["variant"].isin(OF_WHAT_STAYED)]
    rows = []
    for method, own in counted.groupby("method", sort=False):
        by_name = own.loc[own["attack"] == "name", ["recovered", "original"]]
        attacks = own[own["attack"] != "name"]
        paid = lines.loc[(lines["method"] == method) & (lines["attack"] == "others"), "recovered"]
        if method == "original" or by_name.empty or attacks.empty or paid.empty:
            continue
        recovered, drawn = by_name.iloc[0]
        worst = attacks.loc[attacks["recovered"].idxmax()]
        parts = {
            "forgetting": 1 - recovered / drawn,
            "robustness": 1 - max(recovered, worst["recovered"]) / drawn,
            "what remains": 1 - paid.mean() / VISIBLE,
        }
        parts = {name: min(max(share, 0.0), 1.0) for name, share in parts.items()}
        mean = 0.0 if 0.0 in parts.values() else harmonic_mean(parts.values())
        strongest = f"{worst['attack']}, {worst['variant']}".removesuffix(", ")
        shown = {name: f"{share:.2f}" for name, share in parts.items()}
        rows.append({"method": method, **shown, "harmonic mean": f"{mean:.2f}", "strongest": strongest})
    return rows


def recovery_figure(summary: Sequence[Line]) -> Figure | None:
    """Recovery over budget: a panel for each attack with several budgets, a line for each method; `None`
    without any."""
    lines = _main_lines(summary)
    lines = lines[(lines["measure"] == RECOGNISED) & (lines["unit"] != "")]
    shown = {}
    for key, panel in lines.groupby(["attack", "variant", "unit"], sort=False):
        if panel["method"].value_counts().max() > 1:
            shown[key] = panel
    if not shown:
        return None
    figure, axes = panels(len(shown), width=3.3, height=2.8, legend=0.6, sharey=True)
    styles = {}
    for i, method in enumerate(lines["method"].unique()):
        line = "-" if i < 10 else "--"  # the colors begin again
        styles[method] = {"color": f"C{i % 10}", "linestyle": line, "marker": "osv^D"[i % 5], "markersize": 3}
    for axis, ((attack, variant, unit), panel) in zip(axes, shown.items(), strict=True):
        for method, points in panel.groupby("method", sort=False):
            axis.plot(points["budget"], points["recovered"].astype(float), label=method, **styles[method])
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks(points["budget"], [f"{budget:g}" for budget in points["budget"]])
        axis.minorticks_off()
        axis.set_ylim(-3, 103)
        axis.set_title(f"{attack}: {variant}" if variant else attack, fontsize=9)
        axis.set_xlabel(unit, fontsize=9)
    figure.supylabel("% of the forgotten recognised", fontsize=9)
    legend_below(figure)
    return figure


def write_outputs(output: Path, config: AttackConfig) -> list[dict[str, Any]]:
    """Write everything but the configuration from the cells that are done, or else from rows.csv; return the
    lines of `summary.csv`."""
    rows = measured_rows(output, "cells", lambda: {"rows": config.collect(output)})
    summary = summarise(rows, config.references)
    write_rows(output / "summary.csv", summary)
    main, lines, sections = largest_budgets(_main_lines(summary)), pd.DataFrame(summary), []
    for measure, (heading, note) in HEADLINES.items():
        measured = main[main["measure"] == measure]
        if len(measured):
            sections.append(Section(heading, note, method_columns(measured)))
    if balanced := balance(_main_lines(summary)):
        sections.append(Section(*BALANCE, balanced))
    for model in config.models:
        own = lines[lines["model"] == model]
        if len(own):
            sections.append(Section(f"{model}: every number", table=method_columns(own), folded=True))
    figure = recovery_figure(summary)
    if figure is not None:
        write_figure(output / "recovery.png", figure)
        sections.append(Section("Budgets", pictures={FIGURE_NOTE: output / "recovery.png"}))
    title = f"Attacked: {', '.join(config.models)}"
    write_report(output, title=title, sections=sections, made_with=made_with(config, _facts(config)))
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
