"""Random samples forgotten: a tenth of the training images, of all classes (the paper's Table 4)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.utils import tqdm
from torch import nn

from more_hf import __version__
from more_hf.classification.heads import find_heads
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table

from ..columns import read_rows, rounded, write_rows
from ..machine import processes, this_run
from ..methods.registry import find_classification_method
from ..page import Section, write_page
from ..run import Cell, Run, held_settings
from ..splits import Splits, split_by_sample
from ..tables import with_interval
from .features import cache
from .membership import confidence, loss_attack, modified_entropy, sample_losses, shadow_attack
from .metrics import accuracy
from .run import (
    Methods,
    apply_method,
    arguments,
    load_data,
    retrain,
    settings_of,
    skipping_divergence,
    start_trainer,
    training_facts,
)
from .store import SamplesConfig
from .tables import (
    COST,
    LOSS_ATTACK,
    REFERENCES,
    config_facts,
    draw_row_accuracies,
    percentages,
    summary_line,
)
from .training import Trainer


SPLITS = ("f", "r", "rt")
ACCURACIES = percentages(*(f"acc_{split}" for split in SPLITS))
MEMBERS = percentages("mia_member", "mia_entropy_member")
NUMBERS = [*ACCURACIES, *LOSS_ATTACK, *MEMBERS, *COST]

GAP = ("acc_f", "acc_r", "acc_rt", "mia_member")  # Table 4's average gap to Retrain is over these
NOTE = (
    "acc_rt is the whole test set. mia_member: percent of forgotten samples that an attack on the confidence "
    "takes for training samples (the paper's Table 4 looks like this); mia_loss: accuracy of appendix B.3's "
    "attack on the loss, 50 is ideal. gap: mean absolute difference to retrain of acc_f, acc_r, acc_rt and "
    "mia_member, on the same seed; smaller is better. 95 % bootstrap intervals."
)


# What the columns of the page's table are, in plain words.
WORDS = {
    "acc_f": "forgotten images recognised, %",
    "acc_r": "other training images, %",
    "acc_rt": "test images, %",
    "mia_member": "forgotten taken for training images, by confidence, %",
    "mia_entropy_member": "the same, by entropy, %",
    "mia_loss": "an attack on the loss is right, %",
    "gap": "mean difference to retrain, points",
}
PAGE_NOTE = (
    "To have forgotten single images is to behave like a model that was trained without them: the closer to "
    "retrain, the better. 95 % bootstrap intervals in brackets."
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
    learning_rate: float | None = None,
    num_workers: int = 0,
    mixed_precision: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train a classifier, let each method forget random samples, and measure its distance to Retrain.

    Arguments, resumption and files are those of `run_kd`, without plots. A `fraction` of the samples is
    forgotten, another draw for each seed. The methods are those that do not need whole classes, and
    `remap-samples`, ours (Algorithm 3).

    Returns:
        `list[dict]`: the lines of `summary.csv`.

    Raises:
        `BenchmarkError`, `DatasetError`: before anything is trained, if the arguments do not go together or
        `output` holds
            another benchmark.
    """
    output = Path(output)
    functions = {name: find_classification_method(name, forgets="samples") for name in methods}
    data = load_data(dataset, path, model, num_workers)
    trainer = start_trainer(
        data,
        model,
        functions,
        Path(models or output / "models"),
        mixed_precision,
        epochs=epochs,
        learning_rate=learning_rate,
    )
    config = SamplesConfig(
        benchmark="kd-samples",
        more_hf=__version__,
        training=training_facts(trainer),
        evaluation={"fraction": fraction},
        seeds=seeds,
        methods=settings_of(functions, settings or {}, tuned or {}, held_settings(output)),
        forget={f"{100 * fraction:g} % of samples": [f"{fraction}"]},
        runs=[this_run(processes())],
    )
    run = Run(config, output)

    cells = run.missing([cell for cell in run.config.cells(output) if cell.method in functions])
    for seed in sorted({cell.seed for cell in cells}):
        splits = split_by_sample(data, fraction, seed=seed)
        original = trainer.original(seed).to(run.state.device)
        if "retrain" in functions:
            trainer.retrained(splits.r, f"{fraction}", seed)
        mine = run.share([cell for cell in cells if cell.seed == seed])
        for cell in tqdm(mine, desc=f"{data.name}, seed {seed}", unit="cell", main_process_only=False):
            with skipping_divergence(cell):
                cell.write(_row(cell, trainer, original, splits, functions, run.config))
    return run.finish(write_outputs)


def _row(
    cell: Cell,
    trainer: Trainer,
    original: nn.Module,
    splits: Splits,
    functions: Methods,
    config: SamplesConfig,
) -> dict[str, Any]:
    """Measure one cell."""
    device = next(original.parameters()).device
    function, model = functions[cell.method], copy.deepcopy(original)
    if cell.method == "retrain":
        name = f"{config.evaluation['fraction']}"
        edited, cost = retrain(function, model, splits, trainer, name, cell.seed)
    else:
        settings = arguments(config.methods[cell.method])
        edited, cost = apply_method(function, model, splits, settings, cell.seed, device)
    edited = edited.to(device)
    (head, *_) = find_heads(edited, splits.f[[0, 1]]["pixel_values"].to(device)).values()
    parts = {"f": splits.f, "r": splits.r, "rt": splits.rt}
    cached = cache(edited, head, parts)
    logits = {name: cached.logits(name) for name in SPLITS}
    labels = {name: part.labels for name, part in parts.items()}

    def members(number) -> float:
        """Percent of the forgotten samples that an attack on a number takes for training samples."""
        return 100 - shadow_attack(*(number(logits[name], labels[name]) for name in ("r", "rt", "f")))

    forgotten, unseen = (sample_losses(logits[name], labels[name]) for name in ("f", "rt"))
    return rounded(
        {
            "method": cell.method,
            "forget": cell.forget,
            "seed": cell.seed,
            **{f"acc_{name}": accuracy(logits[name], labels[name]) for name in SPLITS},
            **loss_attack(forgotten, unseen),
            "mia_member": members(confidence),
            "mia_entropy_member": members(modified_entropy),
            **vars(cost),
            **{f"n_{name}": len(labels[name]) for name in SPLITS},
        }
    )


def write_outputs(output: Path, config: SamplesConfig) -> list[dict[str, Any]]:
    """Write rows.csv and everything made from it; return the summary."""
    write_rows(output / "rows.csv", [cell.read() for cell in config.cells(output) if cell.is_done])
    return _write(output, config)


def rebuild(output: str | Path) -> list[dict[str, Any]]:
    """Write the tables of a folder again from its rows.csv; return the summary."""
    output = Path(output)
    return _write(output, SamplesConfig.read(output))


def _write(output: Path, config: SamplesConfig) -> list[dict[str, Any]]:
    summary = summarise(read_rows(output / "rows.csv"))
    write_rows(output / "summary.csv", summary)
    table = short_table(summary)
    commands = "\n".join(f"- `{command}`" for command in config.commands)
    found = finding(summary)
    write_text(output / "table.md", f"{found}\n\n{markdown_table(table)}\n\n{NOTE}\n\n{commands}\n")
    write_page(
        output / "report.html",
        title=f"Random samples forgotten: {config.training.dataset}, {config.training.model}",
        finding=found,
        sections=[
            Section(
                "Distance to retraining",
                PAGE_NOTE,
                table=table,
                words=WORDS,
                files=("table.md", "summary.csv", "rows.csv"),
            ),
            Section("What the columns are", NOTE, folded=True),
            Section("How it was made", facts=config_facts(config), folded=True),
        ],
    )
    return summary


def summarise(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One line per method: means over seeds, intervals of accuracies, the average gap to Retrain."""
    numbers = rows.set_index("seed")[["method", *GAP]]
    retrained = numbers[numbers["method"] == "retrain"]
    lines = []
    for method, part in rows.groupby("method", sort=False):
        drawn, _ = draw_row_accuracies(part, [column.name for column in ACCURACIES])
        line = summary_line(method, part["forget"].iloc[0], part, NUMBERS, drawn)
        gaps = numbers[numbers["method"] == method][list(GAP)] - retrained[list(GAP)]
        lines.append({**line, **rounded({"gap": gaps.abs().stack().mean()})})
    return lines


def finding(summary: Sequence[Mapping[str, Any]]) -> str:
    """Say in plain words which method comes closest to retraining, and whether doing nothing is as close."""
    lines = {line["method"]: line for line in summary}
    rivals = [line for name, line in lines.items() if name not in REFERENCES and line["gap"] is not None]
    if "original" not in lines or not rivals:
        return "Original, retrain and a method are needed to say how close a method comes to retraining."
    original, retrained = lines["original"], lines["retrain"]
    best = min(rivals, key=lambda line: line["gap"])
    closer = [line["method"] for line in rivals if line["gap"] < original["gap"]]
    return (
        f"The original recognises {original['acc_f']:.1f} % of the forgotten images, a model retrained "
        f"without them {retrained['acc_f']:.1f} %. {best['method']} comes closest to retraining: its numbers "
        f"differ by {best['gap']:.2f} points on average, those of the original by {original['gap']:.2f}. "
        f"{len(closer)} of {len(rivals)} methods are closer than doing nothing."
    )


def short_table(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Table 4's columns and the other attack."""
    return [
        {
            "method": line["method"],
            "seeds": line["seeds"],
            **{column.name: with_interval(line, column.name, ".2f", ".1f") for column in ACCURACIES},
            **{column.name: column.format(line[column.name], 2) for column in MEMBERS},
            "mia_loss": with_interval(line, "mia_loss", ".2f", ".1f"),
            "gap ↓": "" if line["gap"] is None else f"{line['gap']:.2f}",
            "seconds": f"{line['seconds']:.2f}",
        }
        for line in summary
    ]


def short_markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """What the command prints."""
    return markdown_table(short_table(summary))
