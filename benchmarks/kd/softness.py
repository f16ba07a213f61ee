"""Deeper than the head, softer and softer: what is still found of a class, and what that costs the rest.

    python benchmarks/kd/softness.py --models MODELS --forget coat    # softness.csv, .md and .png

Two of `deeper.py`'s edits of every layer, on both networks: our remap to one class, with the soft solver
(μ → 0 is the exact one), and the regression of the class's answers (s → 0 gives them all the weight). Each
softness is a point of a curve: a new linear head trained to the end, nearest neighbours and a perceptron, on
200 images a class. `finetune` is an epoch of gradient steps from the same network, with the rate chosen on
another class. A row that is in the CSV file is not measured again.
"""

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pandas as pd
from deeper import (
    HERE,
    Judge,
    edit_layers,
    erased_head,
    make_task,
    regression,
    remapping,
    retrain,
)
from matplotlib.figure import Figure
from torch import nn

from more_hf.data import load_classifier
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.features import cache
from more_hf_bench.classes.heads import EPOCHS, HIDDEN, fit_perceptron, nearest_neighbours
from more_hf_bench.classes.metrics import harmonic_mean, linear_cka
from more_hf_bench.classes.probes import converged_probe
from more_hf_bench.classes.training import without
from more_hf_bench.columns import read_cells, read_rows, write_rows
from more_hf_bench.figures import write_figure
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.script import argument_parser, write_table
from more_hf_bench.splits import split_by_class


NEIGHBOURS = 5
CHOSEN = {
    "fashion-mnist-allcnn": "chosen-allcnn",
    "fashion-mnist-vit": "chosen-vit",
}  # settings of `finetune`
CURVES = {
    "remap": (partial(remapping, solver="soft"), (0.001, 0.01, 0.1, 1.0, 3.0, 10.0, 100.0, 1000.0)),
    "regression": (regression, (0.1, 1.0, 3.0, 10.0, 100.0, 1000.0)),
}
REFERENCES = {"original": "s", "finetune": "*", "retrain": "D"}  # and their marks
ATTACKERS = {"probe_ft": "a new linear head", "knn_ft": "nearest neighbors", "mlp_ft": "a perceptron"}


def make(judge: Judge, model: str, edit: str, softness: float | None) -> nn.Module:
    """One of the references, or a copy of the original with an edit of every layer and of the head."""
    task = judge.task
    if edit == "original":
        return task.original
    if edit == "retrain":
        return judge.retrained.cached.model
    copied = copy.deepcopy(task.original)
    if edit == "finetune":
        settings = json.loads((HERE / CHOSEN[model] / "settings.json").read_text())[edit]
        splits = split_by_class(task.data, [task.data.class_names[task.forget]])
        return CLASSIFICATION[edit].load()(copied, splits, **settings)
    edit_layers(task, copied, partial(CURVES[edit][0], softness=softness))
    return erased_head(task, copied)


def measure(judge: Judge, model: nn.Module) -> dict[str, float]:
    """What the classifier's own head and three attackers recognise, of the class and of the others; RUS."""
    cached = cache(model, model.get_submodule(judge.task.head), judge.parts)
    train, test = cached.features("train"), cached.features("test")
    labels, classes = judge.parts["train"].labels, len(judge.task.data.class_names)
    perceptron = fit_perceptron(lambda epoch: train, labels, classes, hidden=HIDDEN, epochs=EPOCHS, seed=0)
    logits = {
        "acc": cached.logits("test"),
        "probe": converged_probe(train, labels)(test),
        "knn": nearest_neighbours(train, labels, test, count=NEIGHBOURS),
        "mlp": perceptron(test),
    }
    row: dict[str, float] = {}
    for name, of_test in logits.items():
        row |= judge.recognised(name, of_test)
    own = labels == judge.task.forget
    for name, seen in (("original", judge.original), ("retrain", judge.retrained)):
        theirs = seen.cached.features("train")
        alike_f, alike_r = (100 * linear_cka(train[mask], theirs[mask]) for mask in (own, ~own))
        unlike = alike_f if name == "original" else 100 - alike_f
        row[f"rus_{name}"] = round(harmonic_mean(unlike, alike_r) / 100, 4)
    return row


def place(row: Mapping[str, str]) -> tuple[int, int, float]:
    """Where a row comes: by network, edit and softness."""
    edits = [*REFERENCES, *CURVES]
    return list(CHOSEN).index(row["model"]), edits.index(row["edit"]), float(row["softness"] or 0)


def draw(rows: pd.DataFrame) -> Figure:
    """For each network and attacker what is found over what the rest has lost, a curve for each edit."""
    models = rows["model"].unique()
    figure = Figure(figsize=(11, 3.3 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), 3, squeeze=False)
    for model, axes in zip(models, grid, strict=True):
        own = rows[rows["model"] == model].set_index("edit")
        start = own.loc["original", "acc_rt"]
        for axis, (column, attacker) in zip(axes, ATTACKERS.items(), strict=True):
            for edit in CURVES:
                curve = own.loc[[edit]].sort_values("softness")
                axis.plot(start - curve["acc_rt"], curve[column], marker="o", label=edit)
            for name, marker in REFERENCES.items():
                point = own.loc[name]
                axis.plot(start - point["acc_rt"], point[column], marker, color="black", ms=8, label=name)
            axis.set(xlabel="points lost of what remains", ylabel=f"found by {attacker}, %")
            axis.set_title(f"{model}, {own['forget'].iloc[0]}", fontsize=9)
    axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", default="fashion-mnist", help="a name of load_kd_data (fashion-mnist)")
    parser.add_argument("--forget", required=True, help="the class")
    parser.add_argument("--models", type=Path, required=True, help="folder of Retrain's classifiers")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()

    data, table = load_kd_data(args.dataset), args.output / "softness.csv"
    for name in CHOSEN:
        task = make_task(data, load_classifier(name).eval(), args.forget)
        judge = Judge.of(task, retrain(task, 1, args.models / f"{name}-1-{without(args.forget, 0)}"))
        done = {(row["model"], row["edit"], row["softness"]) for row in read_cells(table)}
        points = [(reference, None) for reference in REFERENCES]
        points += [(edit, amount) for edit, (_, amounts) in CURVES.items() for amount in amounts]
        for edit, amount in points:
            softness = "" if amount is None else str(amount)
            if (name, edit, softness) not in done:
                row = {"model": name, "forget": args.forget, "edit": edit, "softness": softness}
                row |= measure(judge, make(judge, name, edit, amount))
                write_rows(table, [*read_cells(table), row])
                print(row, flush=True)
    write_figure(args.output / "softness.png", draw(read_rows(table)))
    write_table(args.output / "softness", sorted(read_cells(table), key=place))


if __name__ == "__main__":
    main()
