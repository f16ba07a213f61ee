"""Everything made from the cells: rows.csv, probes.csv, summary.csv, table.md, plots, report.html."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from more_hf.core.markdown import markdown_table

from ..columns import Column, read_rows, write_rows
from ..page import Section, write_report
from ..tables import POOLED, compare, made_with, measured_rows, pivot, share
from . import samples
from .plots import write_plots
from .store import ClassesConfig
from .summary import (
    CONVERGED,
    COST,
    GAP,
    MEMBERSHIP,
    NEW_HEAD,
    OTHER_HEADS,
    OWN_HEAD,
    REFERENCES,
    SHORT,
    SIMILARITY,
    Line,
    summarise,
)


# What the columns of the page's tables are, in plain words.
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
# The page's pictures: heading and caption. The first stands open above the tables.
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
    "Linear CKA with the features of original and retrain; rus: POUR's score of it, 1 is best; the cosine of "
    "class means with their own place before, mean over forgotten and least of remaining classes; load_cv: "
    "how unevenly experts are used"
)
IDI_NOTE = "; idi: what all blocks tell about who is forgotten, 0 for retrain and 1 for original"


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
    if samples.GAP in summary[0]:
        return markdown_table(samples.short_table(summary))
    pooled = [line for line in summary if line["forget"] == POOLED]
    return markdown_table(_compare(pooled or summary, SHORT))


def write_outputs(output: Path, config: ClassesConfig) -> list[dict[str, Any]]:
    """Write everything but the configuration from the cells that are done, or else from rows.csv and
    probes.csv; return the lines of `summary.csv`."""
    rows = measured_rows(output, "cells", lambda: config.collect(output))
    if config.forgets_samples:
        what, words, summary = "Random samples", samples.WORDS, samples.summarise(rows)
        found, parts = samples.finding(summary), samples.sections(summary)
    else:
        what, words, summary = "Classes", WORDS, summarise(rows)
        if done := config.done(output):
            write_plots(output / "plots", config, done, summary)
        found = finding(summary, config.methods)
        pictures = [
            Section(heading, pictures={caption: path}, folded=name != "tsne")
            for name, (heading, caption) in PICTURES.items()
            if (path := output / "plots" / f"{name}.png").is_file()
        ]
        tables = sections(summary, read_rows(output / "probes.csv"))
        parts = [*pictures[:1], Section("How to read the tables", PAGE_NOTE), *tables, *pictures[1:]]
    write_rows(output / "summary.csv", summary)
    write_report(
        output,
        title=f"{what} forgotten: {config.training.dataset}, {config.training.model}",
        finding=found,
        sections=parts,
        made_with=made_with(config, _facts(config)),
        words=words,
    )
    return summary


def _compare(
    summary: Sequence[Line], columns: Sequence[Column], *, interval_decimals: int | None = None
) -> list[dict[str, Any]]:
    return compare(
        [{**line, "runs": line["seeds"]} for line in summary],
        ("method", "forget", "runs"),
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


def by_rate(probes: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Each method's mean HM of its new heads at each learning rate (Tables 9 and 15): `kr_hm_0.01`, ..."""
    means = probes.groupby(["method", "learning_rate"], sort=False)[["hm", "hm_t"]].mean()
    found: dict[str, dict[str, float]] = {}
    for (method, rate), line in means.iterrows():
        own = {f"kr_{name}_{rate}": round(value, 6) for name, value in line.items()}
        found.setdefault(method, {}).update(own)
    return found


def _facts(config: ClassesConfig) -> list[str]:
    """The configuration in sentences, for table.md."""
    training = config.training
    recipe = ", ".join(f"{name} {value}" for name, value in asdict(training.recipe).items())
    forgotten = "; ".join(", ".join(names) for names in config.forget.values())
    measured = f"{config.evaluation.get('probe_seeds')} probe seeds; forgotten: {forgotten}"
    if config.forgets_samples:
        measured = f"forgotten: {', '.join(config.forget)}"
    facts = [
        f"{training.dataset}, {training.images} training images of {training.image_size} pixels; "
        f"{training.model}; {recipe}",
        f"{config.seeds} training(s); {measured}",
    ]
    for name, settings in config.methods.items():
        if settings:
            facts.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    return facts
