"""The README's tables from the rows of the result folders, and the list of misses.

    python benchmarks/kd/tables.py

For each model `tables/MODEL.md` is about the closed forms, over all classes and seeds: (0) means, (1) every
seed, (2) who keeps what remains and forgets what is forgotten, (3) for which classes not, (4) every run that
does not. `tables/MODEL-trained.md` is about all methods, on the classes and seeds that the trained ones were
run on: (0) all of them, (1) a short table. `tables/MODEL-covariance.md` is about ours with the covariance
solver: (0) means, (1) and (2) as (2) and (3) above. `tables/emoji-100.md` is about ten classes of a hundred
forgotten together, `tables/samples.md` about single samples, `tables/MODEL-fitted.md` about originals that
know every training image; `tables/paper.md` puts ours beside the paper's.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf_bench.classes import samples as kd_samples
from more_hf_bench.classes.summary import REFERENCES, summarise
from more_hf_bench.columns import read_rows
from more_hf_bench.methods.registry import CLASSIFICATION


HERE = Path(__file__).parent
MODELS = ("allcnn", "vit")
COLUMNS = {
    "acc_ft": "acc_ft",
    "acc_rt": "acc_rt",
    "hm_t": "hm_t",
    "kr_acc_ft": "kr_acc_ft",
    "kr_hm_t": "kr_hm_t",
    "kr_converged_acc_ft": "kr_converged_acc_ft",
    "kr_converged_hm_t": "kr_converged_hm_t",
    "kr_converged_auc_rest": "auc_rest",
    "kr_converged_auc_target": "auc_target",
    "kr_binary_auc_rest": "binary_auc_rest",
    "kr_knn_acc_ft": "knn_acc_ft",
    "kr_mlp_acc_ft": "mlp_acc_ft",
    "gap_closed": "gap_closed",
    "idi": "idi",
}
MEMBERSHIP = {"mia_loss": "mia_loss", "mia_confidence": "mia_confidence", "mia_entropy": "mia_entropy"}
KEPT, FORGOTTEN = 0.5, 0.5  # points of acc_rt that may be lost, percent of acc_ft that may be left
OURS = ("remap", "more", "more-hash", "more-prototype")  # with their rows -reloaded and -x16
TRAINED = 3  # of the trained baselines, how many are in the short table
# The paper's names, and its data next to ours: one class, and ten of a hundred. But for the first of them our
# originals know every training image, as the paper's do.
PAPER = {
    "original": "Original",
    "retrain": "Retrain",
    "esc": "ESC",
    "leace-rest": "",
    "remap": "Remap",
    "more": "MoRE",
    "more-reloaded": "",
}
FITTED = {"allcnn": "fashion-mnist-6000-allcnn", "resnet18": "fashion-mnist-6000-resnet18"}
BESIDE = {"cifar10": ("fashion-mnist-allcnn", *FITTED.values()), "cifar100": ("emoji-100",)}
SHORT = ("esc", "leace-rest", "remap", "more", "more-reloaded", "more-x16")

Rows = Sequence[Mapping[str, Any]]
Table = list[dict[str, Any]]


def main() -> None:
    for model in MODELS:
        closed, trained, covariance = (
            read(f"fashion-mnist-{model}{part}") for part in ("", "-trained", "-covariance")
        )
        write(model, closed, means, every_seed, kept, by_class, misses)
        write(f"{model}-trained", together(closed, trained), means, short)
        write(f"{model}-covariance", covariance, means, kept, by_class)
    write("emoji-100", read("emoji-100"), means)
    for model, folder in FITTED.items():
        write(f"{model}-fitted", read(folder), membership)
    write("paper", read("emoji-100"), beside_the_paper)
    samples = read("fashion-mnist-samples")
    write("samples", samples, lambda rows: kd_samples.short_table(kd_samples.summarise(pd.DataFrame(rows))))


def read(folder: str) -> Table:
    """Read the rows of a result folder, with classes by name however they were asked for; none where it was
    not run."""
    path = HERE / folder
    if not (path / "rows.csv").is_file():
        return []
    names = json.loads((path / "config.json").read_text("utf-8"))["forget"]
    rows = read_rows(path / "rows.csv")
    return rows.assign(forget=["+".join(names[forget]) for forget in rows["forget"]]).to_dict("records")


def write(name: str, rows: Rows, *tables: Callable[[Rows], Table]) -> None:
    """Write tables of rows one below the other, unless there are no rows."""
    if rows:
        texts = [markdown_table(table(rows)) for table in tables]
        write_text(HERE / "tables" / f"{name}.md", "\n\n".join(texts) + "\n")


def together(closed: Rows, trained: Rows) -> Rows:
    """Join the rows of both folders on the classes and seeds that all methods of the second were run on, in
    the order of the methods; the second's where both have one."""
    done: dict[str, set] = {}
    for row in trained:
        done.setdefault(row["method"], set()).add((row["forget"], row["seed"]))
    runs = set.intersection(*done.values()) if done else set()
    others = [row for row in closed if row["method"] not in done]
    rows = [row for row in (*trained, *others) if (row["forget"], row["seed"]) in runs]
    order = list(CLASSIFICATION)
    return sorted(rows, key=lambda row: order.index(base(row["method"])))


def base(method: str) -> str:
    """The method that a row belongs to: `more` for `more-x16`, `more-hash` for `more-hash-reloaded`."""
    names = [name for name in CLASSIFICATION if method == name or method.startswith(f"{name}-")]
    return max(names, key=len)


def pooled(rows: Rows) -> Table:
    """One line per method: means over classes and seeds."""
    return summarise(pd.DataFrame(rows).assign(forget=""))


def membership(rows: Rows) -> Table:
    """Means with the attacks on membership, which say something where an original knows its images."""
    return means(rows, COLUMNS | MEMBERSHIP)


def means(rows: Rows, columns: Mapping[str, str] = COLUMNS) -> Table:
    lines = pooled(rows)
    return [
        {
            "method": line["method"],
            "runs": line["seeds"],
            **{name: percent(line[column]) for column, name in measured(lines, columns).items()},
            "seconds": percent(line["seconds"]),
        }
        for line in lines
    ]


def measured(lines: Table, columns: Mapping[str, str] = COLUMNS) -> dict[str, str]:
    """Those of the columns that some line has a number in."""
    found = {column for line in lines for column, value in line.items() if value is not None}
    return {column: name for column, name in columns.items() if column in found}


def every_seed(rows: Rows) -> Table:
    """Means over classes for each seed, one after the other."""
    by_seed = []
    for seed in sorted({row["seed"] for row in rows}):
        lines = pooled([row for row in rows if row["seed"] == seed])
        by_seed.append({line["method"]: line for line in lines})
    table = []
    for method in by_seed[0]:
        lines = [lines[method] for lines in by_seed if method in lines]
        row = {"method": method}
        for column, name in measured([*by_seed[0].values()]).items():
            row[name] = " / ".join(percent(line[column]) for line in lines)
        table.append(row)
    return table


@dataclass(frozen=True)
class Loss:
    """What a run of ours lost of acc_rt to Original on the same class and seed, and the acc_ft that is
    left."""

    method: str
    forget: str
    seed: int
    acc_ft: float
    lost: float

    @property
    def missed(self) -> bool:
        return self.lost > KEPT or self.acc_ft > FORGOTTEN


def losses(rows: Rows) -> list[Loss]:
    original = {(row["forget"], row["seed"]): row["acc_rt"] for row in rows if row["method"] == "original"}
    return [
        Loss(
            row["method"],
            row["forget"],
            row["seed"],
            row["acc_ft"],
            original[row["forget"], row["seed"]] - row["acc_rt"],
        )
        for row in rows
        if base(row["method"]) in OURS
    ]


def kept(rows: Rows) -> Table:
    """For each of ours, the worst run and how many runs miss."""
    found = losses(rows)
    table = []
    for method in dict.fromkeys(loss.method for loss in found):
        runs = [loss for loss in found if loss.method == method]
        table.append(
            {
                "method": method,
                "runs": len(runs),
                "most acc_rt lost": percent(max(run.lost for run in runs)),
                "largest acc_ft": percent(max(run.acc_ft for run in runs)),
                "misses": sum(run.missed for run in runs),
            }
        )
    return table


def by_class(rows: Rows) -> Table:
    """For each class how many runs miss, and the largest loss of acc_rt and the largest acc_ft of all its
    runs."""
    found = losses(rows)
    table = []
    for forget in dict.fromkeys(loss.forget for loss in found):
        row = {"forget": forget}
        for method in dict.fromkeys(loss.method for loss in found):
            runs = [loss for loss in found if (loss.method, loss.forget) == (method, forget)]
            row[method] = ""
            if runs:
                worst = f"{max(run.lost for run in runs):.1f}, {max(run.acc_ft for run in runs):.1f}"
                row[method] = f"{sum(run.missed for run in runs)} of {len(runs)} ({worst})"
        table.append(row)
    return table


def misses(rows: Rows) -> Table:
    """Every run of ours that loses more than `KEPT` or leaves more than `FORGOTTEN`; a line that says so if
    none does."""
    table = [
        {**vars(loss), "acc_ft": percent(loss.acc_ft), "lost": percent(loss.lost)}
        for loss in losses(rows)
        if loss.missed
    ]
    return table or [{"method": "none", "forget": "", "seed": "", "acc_ft": "", "lost": ""}]


def short(rows: Rows) -> Table:
    """References, the trained baselines with the largest hm_t, and `SHORT`."""
    hm_t = {line["method"]: line["hm_t"] for line in pooled(rows)}
    trained = [
        name
        for name in hm_t
        if name in CLASSIFICATION
        and not CLASSIFICATION[name].closed_form
        and name not in (*REFERENCES, *OURS)
    ]
    best = sorted(trained, key=lambda name: -hm_t[name])[:TRAINED]
    return [line for line in means(rows) if line["method"] in (*REFERENCES, *best, *SHORT)]


def beside_the_paper(_: Rows) -> Table:
    """Table 1 next to what was run here on data of the same kind, and what each method lost of acc_rt."""
    names = ("acc_f", "acc_r", "acc_ft", "acc_rt", "hm_t", "kr_acc_ft", "kr_hm_t")
    printed: dict[tuple[str, str], dict[str, float]] = {}
    with (HERE / "paper_table1.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            means = {name: float(line[name].partition("±")[0]) for name in names}
            printed[line["dataset"], line["method"]] = {**means, "mia_loss": None}
    table = []
    for dataset, folders in BESIDE.items():
        places = {
            f"{dataset}, the paper's": {method: printed.get((dataset, n)) for method, n in PAPER.items()}
        }
        for folder in folders:
            places[folder] = {line["method"]: line for line in pooled(read(folder))}
        for place, lines in places.items():
            for method in PAPER:
                if lines.get(method) is not None:
                    lost = lines["original"]["acc_rt"] - lines[method]["acc_rt"]
                    row = {"data": place, "method": method, "acc_rt lost": percent(lost)}
                    table.append(row | {name: percent(lines[method][name]) for name in (*names, "mia_loss")})
    return table


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
