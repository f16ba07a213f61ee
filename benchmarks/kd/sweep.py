"""One factor of our edit at a time: the number of experts (the paper's Fig. 7 and Table 12), or the target class (Table 5).

    python benchmarks/kd/sweep.py experts --dataset digits --forget 3 --values 1 2 4 8 --output SWEEP
    python benchmarks/kd/sweep.py target --dataset digits --forget 3 --output SWEEP

Every value is a `bench kd` in a folder of its own below SWEEP, all with the same trained classifiers, and resumes as that does.
`SWEEP/sweep.csv` has the lines of all summaries, `SWEEP/sweep.png` the harmonic means with their intervals.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from more_hf.evaluation.kd import run_kd
from more_hf.evaluation.kd_data import load_kd_data
from more_hf.report import markdown_table, write_rows


SHOWN = ("hm_t", "kr_hm_t", "kr_converged_hm_t")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factor", choices=("experts", "target"))
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", default="allcnn-narrow")
    parser.add_argument("--forget", required=True)
    parser.add_argument("--values", nargs="+", type=int, help="numbers of experts, or class numbers (every remaining class)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="of a training (the recipe's)")
    parser.add_argument("--models", type=Path, help="folder of trained classifiers (models in --output)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    method = {"experts": "more", "target": "remap"}[args.factor]
    values = args.values
    if values is None:
        data = load_kd_data(args.dataset)
        values = [c for c in range(len(data.class_names)) if data.class_names[c] not in args.forget.split("+")]
    lines = []
    for value in values:
        tuned = {"num_experts": value} if args.factor == "experts" else {"remap_to": value, "num_experts": 1}
        summary = run_kd(
            args.dataset,
            args.model,
            [method],
            args.forget,
            output=args.output / f"{args.factor}-{value}",
            seeds=args.seeds,
            epochs=args.epochs,
            models=args.models or args.output / "models",
            tuned={method: tuned},
        )
        lines += [{args.factor: value, **line} for line in summary]
        write_rows(args.output / "sweep.csv", lines)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis, own = figure.subplots(), [line for line in lines if line["method"] == method]
    for column in SHOWN:
        centre = [line[column] for line in own]
        ends = [[abs(line[f"{column}{end}"] - line[column]) for line in own] for end in ("_low", "_high")]
        axis.errorbar([str(line[args.factor]) for line in own], centre, ends, label=column, capsize=3, marker="o", ms=4)
    axis.set_xlabel(args.factor)
    axis.set_ylabel("percent")
    axis.legend()
    figure.savefig(args.output / "sweep.png", dpi=110)
    print(markdown_table(lines, [args.factor, "method", "acc_ft", "acc_rt", *SHOWN]))


if __name__ == "__main__":
    main()
