"""What a knowledge-deletion benchmark leaves: rows.csv, probes.csv, summary.csv, table.md, plots, report.html. All of it from its cells."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.files import write_text
from ...core.markdown import markdown_table, number
from ..artists.store import BenchmarkError, read_config
from ..columns import write_rows
from ..page import html_facts, html_table, write_html
from .plots import write_plots
from .summary import BETTER, POOLED, read_rows, summarise


RELOADED = "-reloaded"
REFERENCES = ("original", "retrain")  # not methods: they are not in bold, and others are compared with them
ARROWS = {"up": "↑", "down": "↓"}
OWN_HEAD = ("acc_f", "acc_r", "acc_ft", "acc_rt", "hm", "hm_t")
NEW_HEAD = tuple(f"kr_{name}" for name in OWN_HEAD)
CONVERGED = (*(f"kr_converged_{name}" for name in OWN_HEAD), "kr_converged_auc_rest", "kr_converged_auc_target")
PRIVACY = ("mia_loss", "mia_loss_low", "mia_loss_high", "mia_loss_auc", "mia_confidence", "mia_entropy")
ALIKE = ("cka_original_f", "cka_original_r", "cka_retrain_f", "cka_retrain_r", "cosine_f", "cosine_r", "load_cv")
COST = ("seconds", "peak_memory")
SHORT = ("acc_f", "acc_r", "acc_ft", "acc_rt", "hm", "hm_t", "kr_acc_ft", "kr_hm_t", "kr_converged_acc_ft", "seconds")


@dataclass(frozen=True)
class KDCell:
    """One method that forgets one entry in one training. It counts when its file is there."""

    method: str
    forget: str
    seed: int
    path: Path


def cells_of(output: Path, config: Mapping[str, Any]) -> list[KDCell]:
    """Every cell of a configuration, done or not: seeds, then entries of `forget`, then methods. A file's name is a hash of all that
    determines what is in it."""
    cells = []
    for seed in range(config["seeds"]):
        for forget, classes in config["forget"].items():
            for method, settings in config["methods"].items():
                determines = [config["training"], config["evaluation"], method, settings, classes, seed, "retrain" in config["methods"]]
                name = hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:16]
                cells.append(KDCell(method, forget, seed, output / "cells" / f"{name}.json"))
    return cells


def rebuild(output: str | Path) -> list[dict[str, Any]]:
    """Write all tables and pages of a folder again, from its cells or else from rows.csv and probes.csv; return the summary."""
    output = Path(output)
    config = read_config(output)
    if (output / "cells").is_dir():
        return write_outputs(output, config)
    if not (output / "rows.csv").is_file():
        raise BenchmarkError(f"{output} has neither cells nor rows.csv, so there is nothing to make tables from.")
    return _write(output, config, read_rows(output / "rows.csv"), read_rows(output / "probes.csv"))


def write_outputs(output: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write everything but the configuration from the cells that are done; return the summary. Raises `BenchmarkError` without any."""
    done = [cell for cell in cells_of(output, config) if cell.path.is_file()]
    if not done:
        raise BenchmarkError(f"{output} has no completed cell yet. Run the same `bench kd` command again.")
    order = list(config["methods"])
    done.sort(key=lambda cell: (list(config["forget"]).index(cell.forget), order.index(cell.method), cell.seed))
    held = [json.loads(cell.path.read_text("utf-8")) for cell in done]
    rows, probes = ([row for cell in held for row in cell[key]] for key in ("rows", "probes"))
    write_rows(output / "rows.csv", rows)
    write_rows(output / "probes.csv", probes)
    write_plots(output / "plots", config, done, summarise(rows))
    return _write(output, config, rows, probes)


def _write(output: Path, config: Mapping[str, Any], rows: Sequence[Mapping], probes: Sequence[Mapping]) -> list[dict[str, Any]]:
    summary = summarise(rows)
    write_rows(output / "summary.csv", summary)
    sections = tables(summary, probes)
    text = "\n\n".join(f"## {heading}\n\n{note}\n\n{markdown_table(table)}" for heading, (note, table) in sections.items())
    write_text(output / "table.md", f"{text}\n\n{_made_with(config)}\n")
    pictures = "".join(
        f'<figure><img style="width:100%;background:#fff" alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path in sorted((output / "plots").glob("*.png"))
    )
    write_html(
        output / "report.html",
        title=f"Classes forgotten: {config['training']['dataset']}, {config['training']['model']}",
        intro="Accuracies in percent: forgotten and remaining classes, training (f, r) and test images (ft, rt). KR is what a new head "
        "finds in the features after the edit.",
        sections={
            **{heading: f"<p>{note}</p>" + _bold(html_table(table)) for heading, (note, table) in sections.items()},
            "Pictures": pictures,
            "How it was made": html_facts({key: config[key] for key in ("training", "evaluation", "methods", "forget")})
            + html_facts({"commands": list(dict.fromkeys(run["command"] for run in config["runs"]))}),
        },
    )
    return summary


def tables(summary: Sequence[Mapping[str, Any]], probes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Heading to a note and a table: the paper's Table 1 first, both halves, then what it leaves out."""
    forgotten = [line["forget"] for line in summary]
    shown = [POOLED] if POOLED in forgotten else list(dict.fromkeys(forgotten))[:1]
    main = [line for line in summary if line["forget"] in shown]
    what = f"Forgotten: {'every entry in turn, means over all' if shown == [POOLED] else shown[0]}."
    found = {
        "Accuracy": (f"{what} 95 % bootstrap intervals over runs and samples.", _cells(main, OWN_HEAD, intervals=True)),
        "Knowledge retention": (
            "A new head trained on the features as in the paper: SGD, learning rate 0.1, 10 epochs, batch 64; mean over probe seeds.",
            _cells(main, NEW_HEAD, intervals=True),
        ),
        "Knowledge retention, converged": (
            "Multinomial logistic regression to the end. auc_rest, auc_target: forgotten test samples against all others, and against "
            "the class they were sent to; 50 says that the probe cannot tell.",
            _cells(main, CONVERGED),
        ),
        "Every probe": (
            "acc_ft of each new head, probe seed after probe seed: a mean hides a coin flip. At 0.001 ten epochs are too few.",
            _every_probe(probes),
        ),
        "Membership": (
            "mia_loss: accuracy of an attack on the loss, 50 is ideal, with a 95 % interval over samples. mia_confidence and mia_entropy: "
            "percent of forgotten samples taken for unseen. To be compared with retrain.",
            _cells(main, PRIVACY),
        ),
        "Similarity": (
            "Linear CKA with the features of original and retrain; the cosine of class means with their own place before, mean over "
            "forgotten and least of remaining classes; load_cv: how unevenly experts are used.",
            _cells(main, ALIKE),
        ),
        "Cost": ("Seconds, and MiB while the method works.", _cells(main, COST)),
    }
    if shown == [POOLED]:
        single = [line for line in summary if line["forget"] != POOLED]
        found["Every erasure"] = ("Means over seeds.", _cells(single, SHORT))
    return found


def short_markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """What the command prints: one line per method."""
    shown = [line for line in summary if line["forget"] == POOLED] or summary
    return markdown_table(_cells(shown, SHORT))


def _cells(summary: Sequence[Mapping[str, Any]], columns: Sequence[str], *, intervals: bool = False) -> list[dict[str, Any]]:
    """Texts of numbers; the best of several methods in bold."""
    lines = []
    for line in summary:
        texts = {"method": line["method"], "forget": line["forget"], "runs": line["seeds"]}
        rivals = [other for other in summary if other["forget"] == line["forget"] and other["method"] not in REFERENCES]
        for column in columns:
            value = line[column]
            values = [other[column] for other in rivals if other[column] is not None]
            text = "" if value is None else number(value) if column.startswith(("cka", "cosine", "load")) else f"{value:.2f}"
            if column in BETTER and len(values) > 1 and line["method"] not in REFERENCES:
                best = (max if BETTER[column] == "up" else min)(values)
                text = f"**{text}**" if value is not None and value == best else text
            if intervals:
                text += f" [{line[f'{column}_low']:.1f}, {line[f'{column}_high']:.1f}]"
            texts[f"{column} {ARROWS[BETTER[column]]}" if column in BETTER else column] = text
        lines.append(texts)
    return lines


def _every_probe(probes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rates = list(dict.fromkeys(probe["learning_rate"] for probe in probes))
    lines: dict[tuple, dict[str, Any]] = {}
    for probe in probes:
        key = (probe["method"], probe["forget"], probe["seed"])
        line = lines.setdefault(key, {"method": key[0], "forget": key[1], "seed": key[2], **{str(rate): "" for rate in rates}})
        line[str(probe["learning_rate"])] = f"{line[str(probe['learning_rate'])]} {probe['acc_ft']:.1f}".strip()
    return list(lines.values())


def _made_with(config: Mapping[str, Any]) -> str:
    training, run = config["training"], config["runs"][-1]
    recipe = ", ".join(f"{key} {value}" for key, value in training["recipe"].items())
    facts = [
        f"{training['dataset']}, {training['images']} training images of {training['image_size']} pixels; {training['model']}; {recipe}",
        f"{config['seeds']} training(s); {config['evaluation']['probe_seeds']} probe seeds; forgotten: "
        + "; ".join(", ".join(names) for names in config["forget"].values()),
        *(f"{name}: {', '.join(f'{k} {v}' for k, v in settings.items())}" for name, settings in config["methods"].items() if settings),
        f"{run['hardware']}, {run['processes']} process(es); "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + f", more_hf {config['more_hf']}",
        *(f"`{command}`" for command in dict.fromkeys(run["command"] for run in config["runs"])),
    ]
    return "\n".join(f"- {fact}" for fact in facts)


def _bold(html: str) -> str:
    return re.sub(r"\*\*([^*<]+)\*\*", r"<b>\1</b>", html)
