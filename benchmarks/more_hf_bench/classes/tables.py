"""Everything made from the cells: rows.csv, probes.csv, summary.csv, table.md, plots, report.html."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table

from ..bootstrap import draw_accuracies, interval
from ..columns import Column, read_rows, rounded, write_rows
from ..errors import BenchmarkError
from ..page import Section, write_page
from ..tables import POOLED, compare, made_with, pivot, share
from .plots import write_plots
from .store import ClassesConfig, SamplesConfig


Line = Mapping[str, Any]  # of `summary.csv`

RELOADED = "-reloaded"
INVERTED = "-inverted"
REFERENCES = ("original", "retrain")  # not methods: others are compared with them

GROUPS = ("", "kr_", "kr_converged_")  # the own head, the paper's new head, the converged one


def scores(group: str) -> list[Column]:
    """The accuracies and harmonic means of one head."""
    return [
        Column(f"{group}acc_f", "%", "down"),
        Column(f"{group}acc_r", "%", "up"),
        Column(f"{group}acc_ft", "%", "down"),
        Column(f"{group}acc_rt", "%", "up"),
        Column(f"{group}hm", "%", "up"),
        Column(f"{group}hm_t", "%", "up"),
    ]


def percentages(*names: str) -> list[Column]:
    """Columns in percent of which neither direction is better."""
    return [Column(name, "%") for name in names]


OWN_HEAD, NEW_HEAD = scores(""), scores("kr_")
CONVERGED = [
    *scores("kr_converged_"),
    *percentages("kr_converged_auc_rest", "kr_converged_auc_target"),
]
# Other attackers: nearest neighbours, a perceptron, and a linear head for the forgotten against all others.
OTHER_HEADS = [
    Column("kr_knn_acc_ft", "%", "down"),
    Column("kr_knn_acc_rt", "%", "up"),
    Column("kr_mlp_acc_ft", "%", "down"),
    Column("kr_mlp_acc_rt", "%", "up"),
    Column("kr_binary_auc_rest", "%"),
]
# Attacks and similarities are compared with Retrain's: neither direction is better.
LOSS_ATTACK = percentages("mia_loss", "mia_loss_low", "mia_loss_high", "mia_loss_auc")
MEMBERSHIP = [*LOSS_ATTACK, *percentages("mia_confidence", "mia_entropy")]
SIMILARITY = [
    *map(Column, ("cka_original_f", "cka_original_r", "cka_retrain_f", "cka_retrain_r")),
    *map(Column, ("cosine_f", "cosine_r", "load_cv", "idi")),
]
# Of the way from Original's kr_converged_acc_ft to Retrain's; above 100 a new head finds less than there.
GAP = Column("gap_closed", "%")
COST = [Column("seconds", "s", "down"), Column("peak_memory", "MiB", "down")]
NUMBERS = [*OWN_HEAD, *NEW_HEAD, *CONVERGED, *OTHER_HEADS, *MEMBERSHIP, *SIMILARITY, *COST]

SHORT = [
    *OWN_HEAD,
    *(column for column in NEW_HEAD if column.name in ("kr_acc_ft", "kr_hm_t")),
    *(column for column in CONVERGED if column.name == "kr_converged_acc_ft"),
    GAP,
    COST[0],
]

# What the columns of the page's table are, in plain words.
WORDS = {
    "acc_ft": "forgotten classes recognised",
    "acc_rt": "other classes recognised",
    "hm_t": "both",
    "kr_acc_ft": "a new head finds of the forgotten",
    "kr_hm_t": "both, with a new head",
    "kr_converged_acc_ft": "a head trained to the end finds",
}
PAGE_NOTE = (
    "Percent of test images; both: the harmonic mean of what is forgotten and what is still "
    "recognised. The new heads are trained on the features after the edit. -reloaded: saved and loaded; "
    "-inverted: asked twice by someone who knows the experts. Bold is the best method."
)
# The pages' pictures: heading and caption. The first stands open above the table.
PICTURES = {
    "tsne": (
        "The feature space",
        "Test images by their features (t-SNE), after every method; the forgotten in red.",
    ),
    "cosines": ("Where the classes went", "Cosines of mean features: before in rows, after in columns."),
    "cost": ("Cost", "Seconds, and MiB while the method works."),
}
RETENTION_NOTE = (
    "A new head trained on the features as in the paper: SGD, learning rate 0.1, 10 epochs, batch 64; "
    "mean over probe seeds."
)
CONVERGED_NOTE = (
    "Multinomial logistic regression to the end. auc_rest, auc_target: forgotten test samples against all "
    "others, and against the class they were sent to; 50 says that the probe cannot tell. gap_closed: how "
    "much of the way from original to retrain acc_ft went."
)
OTHER_HEADS_NOTE = (
    "Five nearest neighbours by cosine, and a perceptron with one hidden layer, both on up to 500 training "
    "images of each class. kr_binary_auc_rest: as auc_rest above, of a linear head for the forgotten against "
    "all others, trained to the end."
)
PROBES_NOTE = (
    "acc_ft of each new head, probe seed after probe seed: a mean hides a coin flip. "
    "At 0.001 ten epochs are too few."
)
MEMBERSHIP_NOTE = (
    "mia_loss: accuracy of an attack on the loss, 50 is ideal, with a 95 % interval over samples. "
    "mia_confidence and mia_entropy: percent of forgotten samples taken for unseen. "
    "To be compared with retrain."
)
SIMILARITY_NOTE = (
    "Linear CKA with the features of original and retrain; the cosine of class means with their own place "
    "before, mean over forgotten and least of remaining classes; load_cv: how unevenly experts are used"
)
IDI_NOTE = "; idi: what all blocks tell about who is forgotten, 0 for retrain and 1 for original"


def rebuild(output: str | Path) -> list[dict[str, Any]]:
    """Write all tables and pages of a folder again, from its cells or else from rows.csv and probes.csv.

    Returns:
        `list[dict]`: the lines of `summary.csv`.
    """
    output = Path(output)
    config = ClassesConfig.read(output)
    if (output / "cells").is_dir():
        return write_outputs(output, config)
    if not (output / "rows.csv").is_file():
        raise BenchmarkError(
            f"{output} has neither cells nor rows.csv, so there is nothing to make tables from. Run the same "
            "`bench kd` command again."
        )
    return _write(output, config)


def write_outputs(output: Path, config: ClassesConfig) -> list[dict[str, Any]]:
    """Write everything but the configuration from the cells that are done.

    Returns:
        `list[dict]`: the lines of `summary.csv`.

    Raises:
        `BenchmarkError`: if no cell is done.
    """
    done = [cell for cell in config.cells(output) if cell.is_done]
    if not done:
        raise BenchmarkError(f"{output} has no completed cell yet. Run the same `bench kd` command again.")
    entries, methods = list(config.forget), list(config.methods)
    done.sort(key=lambda cell: (entries.index(cell.forget), methods.index(cell.method), cell.seed))
    measured = [cell.read() for cell in done]
    write_rows(output / "rows.csv", [row for cell in measured for row in cell["rows"]])
    write_rows(output / "probes.csv", [probe for cell in measured for probe in cell["probes"]])
    write_plots(output / "plots", config, done, summarise(read_rows(output / "rows.csv")))
    return _write(output, config)


def summarise(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Summarise rows: a line per method and entry of `forget`, then one per method over its entries.

    Every number is the mean over rows. Accuracies and harmonic means have a 95 % bootstrap interval, `_low`
    and `_high`: rows (seeds, erasures) are drawn with replacement, and in each the hits among its n samples
    from a binomial. `seeds` is the number of rows; `n_f` and `n_r` count the training samples that are
    forgotten and remain in one of them.
    """
    lines = [_line(*key, part) for key, part in rows.groupby(["method", "forget"], sort=False)]
    for method, part in rows.groupby("method", sort=False):
        if part["forget"].nunique() > 1:
            lines.append(_line(method, POOLED, part))
    return [{**line, GAP.name: _gap_closed(line, lines)} for line in lines]


def _gap_closed(line: Line, lines: Sequence[Line]) -> float | None:
    """
    How much of the way from Original to Retrain a line went, in percent, by what the converged head finds of
    the forgotten; `None` where one of them is missing or they are less than a point apart.
    """
    name = "kr_converged_acc_ft"
    found = {other["method"]: other[name] for other in lines if other["forget"] == line["forget"]}
    original, retrain = (found.get(reference) for reference in REFERENCES)
    if None in (original, retrain, line[name]) or original - retrain < 1:
        return None
    return round(100 * (original - line[name]) / (original - retrain), 6)


def _line(method: str, forget: str, rows: pd.DataFrame) -> dict[str, Any]:
    accuracies = [f"{group}acc_{split}" for group in GROUPS for split in ("f", "r", "ft", "rt")]
    drawn, picks = draw_row_accuracies(rows, accuracies)
    # Harmonic means are taken of the accuracies in the same draw.
    for group in GROUPS:
        for name, f, r in (("hm", "acc_f", "acc_r"), ("hm_t", "acc_ft", "acc_rt")):
            hm = _harmonic_mean(drawn[group + f], drawn[group + r])
            if group == "kr_":
                # A row's accuracies are means over probes, and the mean of the probes' HM is not the HM of
                # these means. All probes are asked about the same samples, whose noise moves both alike.
                of_means = _harmonic_mean(rows[group + f], rows[group + r])
                hm = np.clip(hm + (rows[group + name] - of_means).to_numpy()[picks], 0, 100)
            drawn[group + name] = hm
    return summary_line(method, forget, rows, NUMBERS, drawn)


def draw_row_accuracies(rows: pd.DataFrame, names: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    Bootstrap draws `(draws, rows)` of the named accuracies, and the rows that were drawn; the sample count of
    `acc_f` is in `n_f`.
    """
    counts = {name: rows["n_" + name.rpartition("acc_")[2]] for name in names}
    return draw_accuracies({name: (counts[name], rows[name]) for name in names})


def summary_line(
    method: str,
    forget: str,
    rows: pd.DataFrame,
    columns: Sequence[Column],
    drawn: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """
    One line of a summary: the mean over rows of each column that they have, with the interval of those drawn.
    """
    line = {"method": method, "forget": forget, "seeds": len(rows)}
    line |= {name: int(rows[name].iloc[0]) for name in ("n_f", "n_r")}
    for name in (column.name for column in columns if column.name in rows):
        line[name] = float(rows[name].astype(float).mean())
        if name in drawn:
            line[f"{name}_low"], line[f"{name}_high"] = interval(drawn[name].mean(1))
    return rounded(line)


def _harmonic_mean(acc_f: np.ndarray, acc_r: np.ndarray) -> np.ndarray:
    forgotten = 100 - acc_f
    return 2 * forgotten * acc_r / np.maximum(forgotten + acc_r, 1e-12)


def finding(summary: Sequence[Line], methods: Collection[str]) -> str:
    """Say in plain words which methods forget best, by their own head and by a new one."""
    shown = _main_lines(summary)
    # Variants of a method (saved and loaded, asked several times) are in the table.
    rivals = [line for line in shown if line["method"] in methods and line["method"] not in REFERENCES]
    sentences = []
    by_name = {line["method"]: line for line in shown}
    if "original" in by_name:
        before = by_name["original"]
        sentences.append(
            f"The original recognises {share(before['acc_ft'])} of the forgotten classes' test images and "
            f"{share(before['acc_rt'])} of the others'."
        )
    if rivals:
        best = max(rivals, key=lambda line: line["hm_t"])
        sentences.append(
            f"After {best['method']}, which forgets best, it is {share(best['acc_ft'])} and "
            f"{share(best['acc_rt'])}; a new head trained on its features finds {share(best['kr_acc_ft'])} "
            "of the forgotten."
        )
        hidden = max(rivals, key=lambda line: line["kr_hm_t"])
        if hidden is not best:
            sentences.append(
                f"{hidden['method']} hides best from a new head, which finds {share(hidden['kr_acc_ft'])}; "
                f"its own head recognises {share(hidden['acc_ft'])} and {share(hidden['acc_rt'])}."
            )
    if "retrain" in by_name:
        found = share(by_name["retrain"]["kr_acc_ft"])
        sentences.append(f"Even after retraining without the classes, a new head finds {found}.")
    return " ".join(sentences) or "Only references were run."


def _main_lines(summary: Sequence[Line]) -> list[Line]:
    """The lines over all entries, or of the first entry if there is one alone."""
    entries = [line["forget"] for line in summary]
    shown = POOLED if POOLED in entries else entries[0]
    return [line for line in summary if line["forget"] == shown]


def _forgotten(lines: Sequence[Line]) -> str:
    """What the methods of these lines forgot, in words."""
    forget = lines[0]["forget"]
    return "every entry in turn, means over all" if forget == POOLED else forget


def sections(summary: Sequence[Line], probes: pd.DataFrame) -> list[Section]:
    """The tables with their notes: the paper's Table 1 first, both halves, then what it leaves out."""
    main = _main_lines(summary)
    accuracy_note = f"Forgotten: {_forgotten(main)}. 95 % bootstrap intervals over runs and samples."
    similarity_note = SIMILARITY_NOTE + (IDI_NOTE if "idi" in main[0] else "") + "."
    tables = [
        Section("Accuracy", accuracy_note, _compare(main, OWN_HEAD, interval_decimals=1)),
        Section("Knowledge retention", RETENTION_NOTE, _compare(main, NEW_HEAD, interval_decimals=1)),
        Section("Knowledge retention, converged", CONVERGED_NOTE, _compare(main, [*CONVERGED, GAP])),
        Section("Every probe", PROBES_NOTE, _every_probe(probes)),
        Section("Membership", MEMBERSHIP_NOTE, _compare(main, MEMBERSHIP)),
        Section("Similarity", similarity_note, _compare(main, SIMILARITY)),
        Section("Cost", "Seconds, and MiB while the method works.", _compare(main, COST)),
    ]
    if any(line.get(column.name) is not None for line in main for column in OTHER_HEADS):
        tables.insert(3, Section("Other heads", OTHER_HEADS_NOTE, _compare(main, OTHER_HEADS)))
    if main[0]["forget"] == POOLED:
        single = [line for line in summary if line["forget"] != POOLED]
        tables.append(Section("Every erasure", "Means over seeds.", _compare(single, SHORT)))
    return tables


def short_markdown(summary: Sequence[Line]) -> str:
    """What the command prints: one line per method."""
    pooled = [line for line in summary if line["forget"] == POOLED]
    return markdown_table(_compare(pooled or summary, SHORT))


def config_facts(config: SamplesConfig) -> dict[str, Any]:
    """The facts of a configuration, as a page lists them."""
    return {
        "training": asdict(config.training),
        "evaluation": config.evaluation,
        "methods": config.methods,
        "forget": config.forget,
        "commands": config.commands,
    }


def _write(output: Path, config: ClassesConfig) -> list[dict[str, Any]]:
    """Write everything that is made from rows.csv and probes.csv."""
    summary, probes = summarise(read_rows(output / "rows.csv")), read_rows(output / "probes.csv")
    write_rows(output / "summary.csv", summary)
    tables = sections(summary, probes)
    parts = [f"## {part.heading}\n\n{part.note}\n\n{markdown_table(part.table)}" for part in tables]
    found = finding(summary, config.methods)
    write_text(output / "table.md", "\n\n".join([found, *parts, made_with(config, _facts(config))]) + "\n")
    _write_page(output, config, summary, found)
    return summary


def _write_page(output: Path, config: ClassesConfig, summary: Sequence[Line], found: str) -> None:
    """Write what is read of all that; the rest is in the files beside the page."""
    pictures = [
        Section(heading, pictures={caption: path}, folded=name != "tsne")
        for name, (heading, caption) in PICTURES.items()
        if (path := output / "plots" / f"{name}.png").is_file()
    ]
    main = _main_lines(summary)
    columns = [column for column in SHORT if column.name in (*WORDS, "seconds")]
    table = Section(
        "Is it forgotten?",
        f"Forgotten: {_forgotten(main)}. {PAGE_NOTE}",
        table=_compare(main, columns, labels=("method", "runs")),
        words=WORDS,
        files=("table.md", "summary.csv", "rows.csv", "probes.csv"),
    )
    how = Section("How it was made", facts=config_facts(config), folded=True)
    write_page(
        output / "report.html",
        title=f"Classes forgotten: {config.training.dataset}, {config.training.model}",
        finding=found,
        sections=[*pictures[:1], table, *pictures[1:], how],
    )


def _compare(
    summary: Sequence[Line],
    columns: Sequence[Column],
    *,
    labels: Sequence[str] = ("method", "forget", "runs"),
    interval_decimals: int | None = None,
) -> list[dict[str, Any]]:
    return compare(
        [{**line, "runs": line["seeds"]} for line in summary],
        labels,
        columns,
        references=REFERENCES,
        decimals=2,
        interval_decimals=interval_decimals,
    )


def _every_probe(probes: pd.DataFrame) -> list[dict[str, Any]]:
    """A line per method, entry and seed, a column per learning rate: `acc_ft` of each probe seed in turn."""
    probes = probes.assign(learning_rate=probes["learning_rate"].astype(str))
    found = probes.groupby(["method", "forget", "seed", "learning_rate"], sort=False)["acc_ft"]
    texts = found.agg(lambda each: " ".join(f"{percent:.1f}" for percent in each))
    return pivot(texts.rename("cell").reset_index(), ["method", "forget", "seed"], "learning_rate")


def _facts(config: ClassesConfig) -> list[str]:
    """The configuration in sentences, for table.md."""
    training = config.training
    recipe = ", ".join(f"{name} {value}" for name, value in asdict(training.recipe).items())
    forgotten = "; ".join(", ".join(names) for names in config.forget.values())
    facts = [
        f"{training.dataset}, {training.images} training images of {training.image_size} pixels; "
        f"{training.model}; {recipe}",
        f"{config.seeds} training(s); {config.evaluation['probe_seeds']} probe seeds; forgotten: {forgotten}",
    ]
    for name, settings in config.methods.items():
        if settings:
            facts.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    return facts
