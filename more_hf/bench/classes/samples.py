"""`run_samples`: a random tenth of the training samples forgotten, of all classes (the paper's Table 4)."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import tqdm

from ...classification.heads import find_heads
from ...core.files import write_text
from ...core.markdown import markdown_table
from ..artists.store import read_config
from ..columns import write_rows
from ..machine import peak_memory, processes
from ..methods.registry import find_classification_method
from ..page import html_facts, html_table, write_html
from ..splits import split_by_sample
from .data import load_kd_data
from .features import cache
from .membership import confidence, loss_attack, modified_entropy, sample_losses, shadow_attack
from .metrics import accuracy
from .models import MODELS, pretrained_inputs
from .start import Trainer, leaving_out_what_diverges, start_run
from .summary import draw_hits, read_rows
from .tables import cells_of


SPLITS = ("f", "r", "rt")
GAP = ("acc_f", "acc_r", "acc_rt", "mia_member")  # the average gap to Retrain is over these, as in Table 4
NOTE = (
    "acc_rt is the whole test set. mia_member: percent of forgotten samples that an attack on the confidence takes for training samples "
    "(the paper's Table 4 looks like this); mia_loss: accuracy of appendix B.3's attack on the loss, 50 is ideal. gap: mean absolute "
    "difference to retrain of acc_f, acc_r, acc_rt and mia_member, on the same seed; smaller is better. 95 % bootstrap intervals."
)


def run_samples(
    dataset: str,
    model: str,
    methods: Sequence[str],
    *,
    output: str | Path,
    fraction: float = 0.1,
    seeds: int = 1,
    path: str | Path | None = None,
    models: str | Path | None = None,
    epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train a classifier, let each method forget a random part of its training samples, and measure how far it is from Retrain.

    Arguments, resumption and files as of `run_kd`, without plots; `fraction` of the samples is forgotten, another draw for each seed.
    Methods are those that do not need whole classes, and `remap-samples`, ours (Algorithm 3). Returns the lines of `summary.csv`.

    Raises `BenchmarkError` before anything is trained, if the arguments do not go together or `output` holds another benchmark.
    """
    state, output = processes(), Path(output)
    functions = {name: find_classification_method(name, forgets="samples") for name in methods}
    data = load_kd_data(dataset, path=path, **({} if model in MODELS else pretrained_inputs(model)))
    config, trainer = start_run(
        "kd-samples",
        data,
        model,
        functions,
        {f"{100 * fraction:g} % of samples": [f"{fraction}"]},
        {"evaluation": {"fraction": fraction}},
        output=output,
        seeds=seeds,
        models=models,
        epochs=epochs,
        settings=settings or {},
        tuned=tuned or {},
    )
    todo = [cell for cell in cells_of(output, config) if not cell.path.is_file() and cell.method in functions]
    for seed in sorted({cell.seed for cell in todo}):
        original, splits = trainer.original(seed), split_by_sample(data, fraction, seed=seed)
        if "retrain" in functions:
            trainer.retrained(splits.r, f"{fraction}", seed)
        mine = [cell for cell in todo if cell.seed == seed][state.process_index :: state.num_processes]
        for cell in tqdm(mine, desc=f"{data.name}, seed {seed}", unit="cell", main_process_only=False):
            with leaving_out_what_diverges(cell):
                write_text(cell.path, json.dumps(_row(cell, trainer, original.to(state.device), splits, functions, config)))
    state.wait_for_everyone()
    summary = write_outputs(output, config) if state.is_main_process else []
    state.wait_for_everyone()
    return summary


def _row(cell, trainer: Trainer, original, splits, functions, config) -> dict[str, Any]:
    """Everything measured of one cell."""
    device, fraction = next(original.parameters()).device, config["evaluation"]["fraction"]
    extra = {"fit": lambda images, seed: trainer.retrained(images, f"{fraction}", seed)} if cell.method == "retrain" else {}
    with peak_memory(device) as peak:
        start = time.perf_counter()
        edited = functions[cell.method](copy.deepcopy(original), splits, seed=cell.seed, **config["methods"][cell.method], **extra)
        seconds = time.perf_counter() - start
    edited = edited.to(device)
    head = next(iter(find_heads(edited, splits.f[[0, 1]]["pixel_values"].to(device)).values()))
    cached = cache(edited, head, {name: getattr(splits, name) for name in SPLITS})
    logits = {name: cached.logits(name) for name in SPLITS}
    labels = {name: getattr(splits, name).labels for name in SPLITS}
    losses = [sample_losses(logits[name], labels[name]) for name in ("f", "rt")]
    attacked = {
        name: [number(logits[split], labels[split]) for split in ("r", "rt", "f")]
        for name, number in (("confidence", confidence), ("entropy", modified_entropy))
    }
    return {
        "method": cell.method,
        "forget": cell.forget,
        "seed": cell.seed,
        **{f"acc_{name}": round(accuracy(logits[name], labels[name]), 6) for name in SPLITS},
        **{name: round(value, 6) for name, value in loss_attack(*losses).items()},
        "mia_member": round(100 - shadow_attack(*attacked["confidence"]), 6),
        "mia_entropy_member": round(100 - shadow_attack(*attacked["entropy"]), 6),
        "seconds": trainer.seconds(f"{fraction}", cell.seed) if cell.method == "retrain" else round(seconds, 4),
        "peak_memory": None if cell.method == "retrain" or peak.mebibytes is None else round(peak.mebibytes, 1),
        **{f"n_{name}": len(labels[name]) for name in SPLITS},
    }


def write_outputs(output: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write rows.csv and everything made from it; return the summary."""
    done = [cell for cell in cells_of(output, config) if cell.path.is_file()]
    rows = [json.loads(cell.path.read_text("utf-8")) for cell in done]
    write_rows(output / "rows.csv", rows)
    return _write(output, config, rows)


def rebuild(output: str | Path) -> list[dict[str, Any]]:
    """Write the tables of a folder again from its rows.csv."""
    output = Path(output)
    return _write(output, read_config(output), read_rows(output / "rows.csv"))


def _write(output: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    summary = summarise(rows)
    write_rows(output / "summary.csv", summary)
    table = short_table(summary)
    commands = list(dict.fromkeys(run["command"] for run in config["runs"]))
    made = "\n".join(f"- `{command}`" for command in commands)
    write_text(output / "table.md", f"{NOTE}\n\n{markdown_table(table)}\n\n{made}\n")
    write_html(
        output / "report.html",
        title=f"Random samples forgotten: {config['training']['dataset']}, {config['training']['model']}",
        intro=NOTE,
        sections={
            "Distance to retraining": html_table(table),
            "How it was made": html_facts({key: config[key] for key in ("training", "evaluation", "methods")} | {"commands": commands}),
        },
    )
    return summary


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per method: means over seeds, intervals of the accuracies, and the average gap to Retrain where it was run."""
    retrained = {row["seed"]: row for row in rows if row["method"] == "retrain"}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        part = [row for row in rows if row["method"] == method]
        line: dict[str, Any] = {"method": method, "forget": part[0]["forget"], "seeds": len(part)}
        line |= {name: part[0][name] for name in ("n_f", "n_r")}
        drawn = draw_hits(part, {f"acc_{split}": split for split in SPLITS})
        for column in part[0]:
            if column in ("method", "forget", "seed") or column.startswith("n_"):
                continue
            values = [row[column] for row in part if row[column] is not None]
            line[column] = round(float(np.mean(values)), 6) if values else None
            if column in drawn:
                low, high = np.quantile(drawn[column].mean(1), (0.025, 0.975))
                line[f"{column}_low"], line[f"{column}_high"] = round(float(low), 6), round(float(high), 6)
        gaps = [abs(row[name] - retrained[row["seed"]][name]) for row in part if row["seed"] in retrained for name in GAP]
        line["gap"] = round(float(np.mean(gaps)), 6) if gaps else None
        lines.append(line)
    return lines


def short_table(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Table 4's columns and the other attack."""
    table = []
    for line in summary:
        texts = {"method": line["method"], "seeds": line["seeds"]}
        for column in (f"acc_{split}" for split in SPLITS):
            texts[column] = f"{line[column]:.2f} [{line[f'{column}_low']:.1f}, {line[f'{column}_high']:.1f}]"
        texts |= {column: f"{line[column]:.2f}" for column in ("mia_member", "mia_entropy_member")}
        texts["mia_loss"] = f"{line['mia_loss']:.2f} [{line['mia_loss_low']:.1f}, {line['mia_loss_high']:.1f}]"
        table.append({**texts, "gap ↓": "" if line["gap"] is None else f"{line['gap']:.2f}", "seconds": f"{line['seconds']:.2f}"})
    return table


def short_markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """What the command prints."""
    return markdown_table(short_table(summary))
