"""The README's tables from the rows of the result folders, and the list of misses.

    python benchmarks/kd/tables.py

For each model `tables/MODEL.md` is about the closed forms, over all classes and seeds: (0) means, (1) every seed, (2) who keeps what
remains and forgets what is forgotten, (3) for which classes not, (4) every run that does not. `tables/MODEL-trained.md` is about all
methods, on the classes and seeds that the trained ones were run on: (0) all of them, (1) a short table.
`tables/MODEL-covariance.md` is about ours with the covariance solver: (0) means, (1) and (2) as (2) and (3) above.
`tables/emoji-100.md` is about ten classes of a hundred forgotten together, `tables/samples.md` about single samples.
"""

import json
from pathlib import Path

from more_hf.bench.classes import samples as kd_samples
from more_hf.bench.classes.tables import REFERENCES, ROW_COLUMNS, summarise
from more_hf.bench.columns import read_rows
from more_hf.bench.methods.registry import CLASSIFICATION
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table


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
}
KEPT, FORGOTTEN = 0.5, 0.5  # points of acc_rt that may be lost, percent of acc_ft that may be left
OURS = ("remap", "more", "more-hash", "more-prototype")  # with their rows -reloaded and -x16
TRAINED = 3  # of the trained baselines, how many are in the short table
SHORT = ("esc", "leace-rest", "remap", "more", "more-reloaded", "more-x16")


def main() -> None:
    for model in MODELS:
        closed, trained, covariance = (read(f"fashion-mnist-{model}{part}") for part in ("", "-trained", "-covariance"))
        write(model, [means(closed), every_seed(closed), kept(closed), by_class(closed), misses(closed)] if closed else [])
        both = together(closed, trained)
        write(f"{model}-trained", [means(both), short(both)] if both else [])
        write(f"{model}-covariance", [means(covariance), kept(covariance), by_class(covariance)] if covariance else [])
    many = read("emoji-100")
    write("emoji-100", [means(many)] if many else [])
    samples = read("fashion-mnist-samples")
    write("samples", [kd_samples.short_table(kd_samples.summarise(samples))] if samples else [])


def read(folder: str) -> list[dict]:
    """The rows of a result folder, classes by name however they were asked for; none where it was not run."""
    path = HERE / folder
    if not (path / "rows.csv").is_file():
        return []
    names = json.loads((path / "config.json").read_text("utf-8"))["forget"]
    columns = kd_samples.ROW_COLUMNS if folder.endswith("samples") else ROW_COLUMNS
    return [row | {"forget": "+".join(names[row["forget"]])} for row in read_rows(path / "rows.csv", columns)]


def write(name: str, tables: list[list[dict]]) -> None:
    if tables:
        write_text(HERE / "tables" / f"{name}.md", "\n\n".join(map(markdown_table, tables)) + "\n")


def together(closed: list[dict], trained: list[dict]) -> list[dict]:
    """The rows of both folders on the classes and seeds that all methods of the second were run on, in the order of the methods; the
    second's where both have one."""
    done: dict[str, set] = {}
    for row in trained:
        done.setdefault(row["method"], set()).add((row["forget"], row["seed"]))
    runs = set.intersection(*done.values()) if done else set()
    rows = [row for row in trained + [row for row in closed if row["method"] not in done] if (row["forget"], row["seed"]) in runs]
    order = list(CLASSIFICATION)
    return sorted(rows, key=lambda row: order.index(base(row["method"])))


def base(method: str) -> str:
    """The method that a row belongs to: `more` for `more-x16`, `more-hash` for `more-hash-reloaded`."""
    return max((name for name in CLASSIFICATION if method == name or method.startswith(f"{name}-")), key=len)


def pooled(rows: list[dict]) -> list[dict]:
    """One line per method: means over classes and seeds."""
    return summarise([row | {"forget": ""} for row in rows])


def means(rows: list[dict]) -> list[dict]:
    return [
        {
            "method": line["method"],
            "runs": line["seeds"],
            **{name: percent(line[column]) for column, name in COLUMNS.items()},
            "seconds": percent(line["seconds"]),
        }
        for line in pooled(rows)
    ]


def every_seed(rows: list[dict]) -> list[dict]:
    """Means over classes for each seed, one after the other."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [{line["method"]: line for line in pooled([row for row in rows if row["seed"] == seed])} for seed in seeds]
    return [
        {
            "method": method,
            **{name: " / ".join(percent(of[method][column]) for of in lines if method in of) for column, name in COLUMNS.items()},
        }
        for method in lines[0]
    ]


def lost(rows: list[dict]) -> list[dict]:
    """For every row of ours: the points of acc_rt that it lost to Original on the same class and seed, and the acc_ft that is left."""
    original = {(row["forget"], row["seed"]): row["acc_rt"] for row in rows if row["method"] == "original"}
    return [
        {**{key: row[key] for key in ("method", "forget", "seed", "acc_ft")}, "lost": original[row["forget"], row["seed"]] - row["acc_rt"]}
        for row in rows
        if base(row["method"]) in OURS
    ]


def missed(line: dict) -> bool:
    return line["lost"] > KEPT or line["acc_ft"] > FORGOTTEN


def kept(rows: list[dict]) -> list[dict]:
    """For each of ours, the worst run and how many runs miss."""
    lines = lost(rows)
    found = []
    for method in dict.fromkeys(line["method"] for line in lines):
        runs = [line for line in lines if line["method"] == method]
        found.append(
            {
                "method": method,
                "runs": len(runs),
                "most acc_rt lost": percent(max(line["lost"] for line in runs)),
                "largest acc_ft": percent(max(line["acc_ft"] for line in runs)),
                "misses": sum(map(missed, runs)),
            }
        )
    return found


def by_class(rows: list[dict]) -> list[dict]:
    """For each class how many runs miss, and the largest loss of acc_rt and the largest acc_ft of all its runs."""
    lines = lost(rows)
    methods, found = dict.fromkeys(line["method"] for line in lines), []
    for forget in dict.fromkeys(line["forget"] for line in lines):
        texts = {"forget": forget}
        for method in methods:
            runs = [line for line in lines if (line["method"], line["forget"]) == (method, forget)]
            worst = [max((run[key] for run in runs), default=0.0) for key in ("lost", "acc_ft")]
            texts[method] = f"{sum(map(missed, runs))} of {len(runs)} ({worst[0]:.1f}, {worst[1]:.1f})" if runs else ""
        found.append(texts)
    return found


def misses(rows: list[dict]) -> list[dict]:
    """Every run of ours that loses more than `KEPT` or leaves more than `FORGOTTEN`; one line that says so if there is none."""
    found = [line | {"acc_ft": percent(line["acc_ft"]), "lost": percent(line["lost"])} for line in lost(rows) if missed(line)]
    return found or [{"method": "none", "forget": "", "seed": "", "acc_ft": "", "lost": ""}]


def short(rows: list[dict]) -> list[dict]:
    """References, the trained baselines with the largest hm_t, and `SHORT`."""
    scores = {line["method"]: line["hm_t"] for line in pooled(rows)}
    trained = [name for name in scores if name in CLASSIFICATION and not CLASSIFICATION[name].closed_form]
    trained = [name for name in trained if name not in (*REFERENCES, *OURS)]
    best = sorted(trained, key=lambda name: -scores[name])[:TRAINED]
    return [line for line in means(rows) if line["method"] in (*REFERENCES, *best, *SHORT)]


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
