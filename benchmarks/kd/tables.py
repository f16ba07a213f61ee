"""The README's tables from the rows of the result folders, and the list of misses.

    python benchmarks/kd/tables.py

For each model `tables/MODEL.md` is about the closed forms, over all classes and seeds: (0) means, (1) every
seed, (2) who keeps what remains and forgets what is forgotten, (3) for which classes not, (4) every run that
does not. `tables/MODEL-trained.md` is about all methods, on the classes and seeds that the trained ones were
run on: (0) all of them, (1) a short table. `tables/allcnn-covariance.md` is about ours with the covariance
solver: (0) means, (1) and (2) as (2) and (3) above, `tables/allcnn-paper.md` about MoRE as the paper prints
it: (0) means, (1) as (2) above, `tables/MODEL-weights.md` about closed forms that read weights.
`tables/emoji-100.md` is about ten classes of a hundred forgotten together,
`tables/samples.md` about single samples, `tables/MODEL-fitted.md` about originals that
know every training image; `tables/paper.md` puts ours beside the paper's. `tables/rates.md` is Table 9, the
new heads by learning rate: (0) AllCNN, (1) ViT, (2) ten classes of a hundred.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf_bench.classes import samples as kd_samples
from more_hf_bench.classes.summary import REFERENCES, summarise
from more_hf_bench.classes.tables import by_rate
from more_hf_bench.columns import read_rows
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.tables import pivot


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
    "rus_original": "rus_original",
    "rus_retrain": "rus_retrain",
}
MEMBERSHIP = {"mia_loss": "mia_loss", "mia_confidence": "mia_confidence", "mia_entropy": "mia_entropy"}
KEPT, FORGOTTEN = 0.5, 0.5  # points of acc_rt that may be lost, percent of acc_ft that may be left
OURS = ("remap", "more", "more-paper", "more-hash", "more-prototype")  # with their rows -reloaded and -x16
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

RUN = ["forget", "seed"]

Table = list[dict[str, Any]]


def main() -> None:
    for model in MODELS:
        closed, trained = read(f"fashion-mnist-{model}"), read(f"fashion-mnist-{model}-trained")
        write(model, closed, means, every_seed, kept, by_class, misses)
        write(f"{model}-trained", together(closed, trained), means, short)
    write("allcnn-covariance", read("fashion-mnist-allcnn-covariance"), means, kept, by_class)
    write("allcnn-paper", read("fashion-mnist-allcnn-paper"), means, kept)
    write("allcnn-weights", read("fashion-mnist-allcnn-weights"), means)
    write("vit-weights", read("fashion-mnist-vit-weights"), means)
    write("resnet18-weights", read("fashion-mnist-6000-resnet18-weights"), means)
    write("emoji-100-weights", read("emoji-100-weights"), means)
    write("emoji-100", read("emoji-100"), means)
    for model, folder in FITTED.items():
        write(f"{model}-fitted", read(folder), membership)
    write("paper", read("emoji-100"), beside_the_paper)
    write_tables("rates", map(rates, ("fashion-mnist-allcnn", "fashion-mnist-vit", "emoji-100")))
    samples = read("fashion-mnist-samples")
    write("samples", samples, lambda rows: kd_samples.short_table(kd_samples.summarise(rows)))


def read(folder: str) -> pd.DataFrame:
    """Read the rows of a result folder, with classes by name however they were asked for."""
    path = HERE / folder
    names = json.loads((path / "config.json").read_text("utf-8"))["forget"]
    rows = read_rows(path / "rows.csv")
    return rows.assign(forget=["+".join(names[forget]) for forget in rows["forget"]])


def write(name: str, rows: pd.DataFrame, *tables: Callable[[pd.DataFrame], Table]) -> None:
    """Write tables of rows one below the other."""
    write_tables(name, [table(rows) for table in tables])


def write_tables(name: str, tables: Iterable[Table]) -> None:
    write_text(HERE / "tables" / f"{name}.md", "\n\n".join(map(markdown_table, tables)) + "\n")


def together(closed: pd.DataFrame, trained: pd.DataFrame) -> pd.DataFrame:
    """Join the rows of both folders on the classes and seeds that all methods of the second were run on, in
    the order of the methods; the second's where both have one."""
    methods = trained.groupby(RUN)["method"].nunique()
    complete = methods.index[methods == methods.max()]
    rows = pd.concat([trained, closed[~closed["method"].isin(trained["method"])]])
    rows = rows[rows.set_index(RUN).index.isin(complete)]
    order = list(CLASSIFICATION)
    places = [order.index(base(method)) for method in rows["method"]]
    return rows.assign(place=places).sort_values("place", kind="stable").drop(columns="place")


def base(method: str) -> str:
    """The method that a row belongs to: `more` for `more-x16`, `more-hash` for `more-hash-reloaded`."""
    names = [name for name in CLASSIFICATION if method == name or method.startswith(f"{name}-")]
    return max(names, key=len)


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per method: means over classes and seeds."""
    return pd.DataFrame(summarise(rows.assign(forget="")))


def rates(folder: str) -> Table:
    """The mean HM of each method's new heads at each learning rate, over classes, seeds and probe seeds."""
    found = by_rate(read_rows(HERE / folder / "probes.csv"))
    return [
        {"method": method, **{name: percent(hm) for name, hm in line.items()}}
        for method, line in found.items()
    ]


def membership(rows: pd.DataFrame) -> Table:
    """Means with the attacks on membership, which say something where an original knows its images."""
    return means(rows, COLUMNS | MEMBERSHIP)


def means(rows: pd.DataFrame, columns: Mapping[str, str] = COLUMNS) -> Table:
    """Means over classes and seeds, as texts."""
    lines = pooled(rows)
    names = measured(lines, columns) | {"seconds": "seconds"}
    table = lines[["method", "seeds", *names]].rename(columns={"seeds": "runs", **names})
    return as_texts(table, list(names.values()))


def measured(lines: pd.DataFrame, columns: Mapping[str, str] = COLUMNS) -> dict[str, str]:
    """Those of the columns that some line has a number in."""
    return {
        column: name for column, name in columns.items() if column in lines and lines[column].notna().any()
    }


def every_seed(rows: pd.DataFrame) -> Table:
    """Means over classes for each seed, one after the other."""
    lines = pd.concat([pooled(part) for _, part in rows.groupby("seed")])
    table = []
    for method, own in lines.groupby("method", sort=False):
        texts = {name: " / ".join(map(percent, own[column])) for column, name in measured(lines).items()}
        table.append({"method": method, **texts})
    return table


def losses(rows: pd.DataFrame) -> pd.DataFrame:
    """
    The runs of ours: what each `lost` of acc_rt to Original on the same class and seed, the acc_ft that is
    left, and whether it `missed`.
    """
    original = rows[rows["method"] == "original"].set_index(RUN)["acc_rt"]
    ours = rows[[base(method) in OURS for method in rows["method"]]]
    lost = original.loc[list(zip(ours["forget"], ours["seed"], strict=True))].to_numpy() - ours["acc_rt"]
    missed = (lost > KEPT) | (ours["acc_ft"] > FORGOTTEN)
    return ours[["method", *RUN, "acc_ft"]].assign(lost=lost, missed=missed)


def kept(rows: pd.DataFrame) -> Table:
    """For each of ours, the worst run and how many runs miss."""
    runs = losses(rows).groupby("method", sort=False)
    worst = {"most acc_rt lost": ("lost", "max"), "largest acc_ft": ("acc_ft", "max")}
    table = runs.agg(runs=("lost", "size"), **worst, misses=("missed", "sum"))
    return as_texts(table.reset_index(), list(worst))


def by_class(rows: pd.DataFrame) -> Table:
    """For each class how many runs miss, and the largest loss of acc_rt and the largest acc_ft of all its
    runs."""
    cells = []
    for (forget, method), runs in losses(rows).groupby(["forget", "method"], sort=False):
        worst = f"{runs['lost'].max():.1f}, {runs['acc_ft'].max():.1f}"
        cells.append((forget, method, f"{runs['missed'].sum()} of {len(runs)} ({worst})"))
    return pivot(pd.DataFrame(cells, columns=["forget", "method", "cell"]), ["forget"], "method")


def misses(rows: pd.DataFrame) -> Table:
    """Every run of ours that loses more than `KEPT` or leaves more than `FORGOTTEN`; a line that says so if
    none does."""
    found = losses(rows)
    table = as_texts(found[found["missed"]].drop(columns="missed"), ["acc_ft", "lost"])
    return table or [{"method": "none", "forget": "", "seed": "", "acc_ft": "", "lost": ""}]


def short(rows: pd.DataFrame) -> Table:
    """References, the trained baselines with the largest hm_t, and `SHORT`."""
    lines = pooled(rows)
    others = {name for name, method in CLASSIFICATION.items() if method.closed_form}
    trained = set(CLASSIFICATION) - others - {*REFERENCES, *OURS}
    best = lines[lines["method"].isin(trained)].nlargest(TRAINED, "hm_t")["method"]
    return [line for line in means(rows) if line["method"] in (*REFERENCES, *best, *SHORT)]


def beside_the_paper(_: pd.DataFrame) -> Table:
    """Table 1 next to what was run here on data of the same kind, and what each method lost of acc_rt."""
    names = ["acc_f", "acc_r", "acc_ft", "acc_rt", "hm_t", "kr_acc_ft", "kr_hm_t"]
    printed = pd.read_csv(HERE / "paper_table1.csv", dtype=str)
    for name in names:
        printed[name] = printed[name].str.partition("±")[0].astype(float)
    ours = {name: method for method, name in PAPER.items()}
    printed = printed.assign(method=printed["method"].map(ours), mia_loss=None)
    table = []
    for dataset, folders in BESIDE.items():
        places = {f"{dataset}, the paper's": printed[printed["dataset"] == dataset]}
        places |= {folder: pooled(read(folder)) for folder in folders}
        for place, lines in places.items():
            lines = lines.set_index("method")
            for method in PAPER:
                if method in lines.index:
                    line = lines.loc[method]
                    lost = lines.loc["original", "acc_rt"] - line["acc_rt"]
                    row = {"data": place, "method": method, "acc_rt lost": percent(lost)}
                    table.append(row | {name: percent(line[name]) for name in (*names, "mia_loss")})
    return table


def as_texts(table: pd.DataFrame, columns: list[str]) -> Table:
    """The rows of a table, with the numbers in some columns as texts."""
    texts = {column: table[column].map(percent) for column in columns}
    return table.assign(**texts).to_dict("records")


def percent(value: float | None) -> str:
    return "" if pd.isna(value) else f"{value:.2f}"


if __name__ == "__main__":
    main()
