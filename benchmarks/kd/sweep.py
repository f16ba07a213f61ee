"""One factor of our edit at a time; the paper's tables behind each command.

    python benchmarks/kd/sweep.py experts --dataset digits --forget 3 --output SWEEP       # Table 12, Fig. 7
    python benchmarks/kd/sweep.py target --dataset digits --forget 3 --output SWEEP        # Table 5
    python benchmarks/kd/sweep.py projection --dataset digits --forget 3 --output SWEEP    # Tables 3, 11, and Eq. 3
    python benchmarks/kd/sweep.py routers --dataset digits --forget 3 --output SWEEP       # Tables 6, 14, 15
    python benchmarks/kd/sweep.py depth --dataset digits --forget 3 --values head features.7 features.6 --output SWEEP    # Tables 7, 13

Every value is a `bench kd` in a folder of its own below SWEEP, all with the same trained classifiers, and resumes as that does.
`SWEEP/sweep.csv` has the lines of all summaries, `SWEEP/sweep.md` a table, `SWEEP/sweep.png` the harmonic means with their intervals.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from more_hf.bench.classes.data import load_kd_data
from more_hf.bench.classes.measure import Shared
from more_hf.bench.classes.run import run_kd
from more_hf.bench.classes.tables import RELOADED
from more_hf.bench.columns import write_rows
from more_hf.bench.splits import KDData, split_by_class
from more_hf.classification.router_training import COMBINATIONS
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table


SHOWN = ("hm_t", "kr_hm_t", "kr_converged_hm_t")
COLUMNS = ("acc_ft", "acc_rt", "hm_t", "kr_acc_ft", "kr_acc_rt", "kr_hm_t", "kr_converged_hm_t", "load_cv")
WITHOUT = ("erase-without-po", "remap-without-po", "erase-without-complement", "remap-without-complement")
ROUTED = (8, 10, 40, 80)  # numbers of experts in Tables 6 and 15
SAMPLES_SEEN = 500_000  # by a router in training: ten epochs of 50,000
PLACES = {"--output": "SWEEP", "--models": "MODELS", "--data": "DATA"}

Variants = dict[str, tuple[str, dict[str, Any]]]  # label to method and its settings


def experts(values: list[str], data: KDData, remaining: list[int]) -> Variants:
    step = 1 if len(remaining) < 20 else 10
    return {str(n): ("more", {"num_experts": int(n)}) for n in values or range(step, len(remaining) + 1, step)}


def target(values: list[str], data: KDData, remaining: list[int]) -> Variants:
    return {str(c): ("remap", {"remap_to": int(c), "num_experts": 1}) for c in values or remaining}


def projection(values: list[str], data: KDData, remaining: list[int]) -> Variants:
    """All that remap do so to the first remaining class, as the variants without PO and without the complement term do."""
    ours = {"erase": {}, "remap": {"remap_to": remaining[0], "num_experts": 1}, "more": {}}
    return {name: (name, ours.get(name, {})) for name in values or ("original", *WITHOUT, *ours)}


def routers(values: list[str], data: KDData, remaining: list[int]) -> Variants:
    """Untrained, then trained with every combination of losses, on as many samples as in the paper."""
    epochs = round(SAMPLES_SEEN / len(data.train))
    found: Variants = {}
    for n in map(int, values or [n for n in ROUTED if n <= len(remaining)]):
        for router in ("random", "hash", "prototype", "prototype_random"):
            found[f"{n} {router}"] = ("more", {"num_experts": n, "router": router})
        for router in ("prototype", "prototype_random"):
            for losses in map("+".join, COMBINATIONS):
                settings = {"num_experts": n, "router": router, "losses": losses, "epochs": epochs}
                found[f"{n} {router} {losses}"] = ("more-trained", settings)
    return found


def depth(values: list[str], data: KDData, remaining: list[int]) -> Variants:
    """`values`: modules whose input is edited, by name; `head` for the last layer."""
    ours = {"erase": {"remap_to": None, "router": None}, "remap": {"router": None}, "more": {}}
    return {
        f"{at} {name}": ("more-inner", {"at": None if at == "head" else at, **settings}) for at in values for name, settings in ours.items()
    }


FACTORS = {function.__name__: function for function in (experts, target, projection, routers, depth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factor", choices=FACTORS)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data", type=Path, help="where the data lie, if not in their usual place")
    parser.add_argument("--model", default="allcnn-narrow")
    parser.add_argument("--forget", required=True)
    parser.add_argument("--values", nargs="+", default=[], help="numbers of experts, class numbers, methods, or modules; depth needs them")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="of a training (the recipe's)")
    parser.add_argument("--models", type=Path, help="folder of trained classifiers (models in --output)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.factor == "depth" and not args.values:
        parser.error("depth needs the names of modules: --values head features.7 features.6")

    data = load_kd_data(args.dataset, path=args.data)
    forget = [int(name) if name not in data.class_names else name for name in args.forget.split("+")]
    remaining = split_by_class(data, forget).r.labels.unique().tolist()
    shared = Shared()  # the original's features are the same for all values, and so are a reloaded model's
    lines, own = [], []
    for label, (method, settings) in FACTORS[args.factor](args.values, data, remaining).items():
        summary = run_kd(
            args.dataset,
            args.model,
            [method],
            args.forget,
            output=args.output / f"{args.factor}-{label}".replace(" ", "-"),
            seeds=args.seeds,
            path=args.data,
            epochs=args.epochs,
            models=args.models or args.output / "models",
            tuned={method: settings},
            shared=shared,
        )
        lines += [{args.factor: label, **line} for line in summary]
        own += [line for line in lines if line[args.factor] == label and line["method"] == method]
        write_rows(args.output / "sweep.csv", lines)
    draw(args.factor, own).savefig(args.output / "sweep.png", dpi=110)
    table = markdown_table([line for line in lines if not line["method"].endswith(RELOADED)], [args.factor, "method", *COLUMNS])
    arguments = [PLACES.get(before, argument) for before, argument in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)]
    command = shlex.join(["python", "benchmarks/kd/sweep.py", *arguments])
    write_text(args.output / "sweep.md", f"`{command}`\n\nPercent; saved and loaded again: in sweep.csv.\n\n{table}\n")
    print(table)


def draw(factor: str, own: list[dict[str, Any]]) -> Figure:
    """Harmonic means of the own head, the paper's new head and the converged one, with 95 % intervals."""
    labels = [line[factor] for line in own]
    long = max(map(len, labels)) > 3  # they are read from the side, one below the other
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(own)) if long else (max(6, 2 + 0.35 * len(own)), 4), layout="constrained")
    axis = figure.subplots()
    for column in SHOWN:
        centre = [line[column] for line in own]
        ends = [[abs(line[f"{column}{end}"] - line[column]) for line in own] for end in ("_low", "_high")]
        place, error = ((centre, labels), {"xerr": ends}) if long else ((labels, centre), {"yerr": ends})
        axis.errorbar(*place, **error, label=column, capsize=3, marker="o", ms=4, ls="" if long else "-")
    categories, percent = (axis.yaxis, axis.xaxis) if long else (axis.xaxis, axis.yaxis)
    categories.set_label_text(factor)
    percent.set_label_text("percent")
    axis.set(**{"xlim" if long else "ylim": (-1, 103)})
    if long:
        axis.set_ylim(len(own) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(SHOWN))
    return figure


if __name__ == "__main__":
    main()
