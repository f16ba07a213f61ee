"""One factor of our edit at a time; the paper's tables after each command.

    python benchmarks/kd/sweep.py experts --dataset digits --forget 3 --output SWEEP     # Table 12, Fig. 7
    python benchmarks/kd/sweep.py target --dataset digits --forget 3 --output SWEEP      # Table 5
    python benchmarks/kd/sweep.py projection --dataset digits --forget 3 --output SWEEP  # Tables 3, 11, Eq. 3
    python benchmarks/kd/sweep.py routers --dataset digits --forget 3 --output SWEEP     # Tables 6, 14, 15
    python benchmarks/kd/sweep.py depth --dataset digits --forget 3 --output SWEEP --values head features.7

With `--preset`, which names one of `bench kd`, on the paper's data and classifiers; `--rehearse` is as there.
`depth` (Tables 7, 13) edits the input of the modules that `--values` names, `head` for the last layer.

Every value is a `bench kd` in a folder of its own below SWEEP, all with the same trained classifiers, and
resumes as that does. `SWEEP/sweep.csv` has the lines of all summaries, `SWEEP/sweep.md` a table,
`SWEEP/sweep.png` the harmonic means with their intervals.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.measure import Shared
from more_hf_bench.classes.run import classes_of, run_kd
from more_hf_bench.classes.summary import RELOADED
from more_hf_bench.classes.tables import by_rate
from more_hf_bench.cli.classes import KDOptions
from more_hf_bench.cli.options import read_options
from more_hf_bench.cli.rehearse import OF_CLASSES, check_filled, rehearse_classes
from more_hf_bench.columns import read_rows, write_rows
from more_hf_bench.figures import write_figure
from more_hf_bench.methods.classification.router_training import COMBINATIONS
from more_hf_bench.script import argument_parser
from more_hf_bench.splits import KDData, split_by_class


SHOWN = ("hm_t", "kr_hm_t", "kr_converged_hm_t")
COLUMNS = ("acc_ft", "acc_rt", "hm_t", "kr_acc_ft", "kr_acc_rt", "kr_hm_t", "kr_hm_t_0.01", "kr_hm_t_0.001")
COLUMNS += ("kr_converged_hm_t", "load_cv")
WITHOUT = ("erase-without-po", "remap-without-po", "erase-without-complement", "remap-without-complement")
ROUTED = (8, 10, 40, 80)  # numbers of experts in Tables 6 and 15
SAMPLES_SEEN = 500_000  # by a router in training: ten epochs of 50,000
PLACES = {"--output": "SWEEP", "--models": "MODELS", "--data": "DATA"}


@dataclass(frozen=True)
class Variant:
    """One value of a factor: a method with its settings."""

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def experts(values: Sequence[str], data: KDData, remaining: Sequence[int]) -> list[Variant]:
    step = 1 if len(remaining) < 20 else 10
    counts = map(int, values or range(step, len(remaining) + 1, step))
    return [Variant(str(n), "more", {"num_experts": n}) for n in counts]


def target(values: Sequence[str], data: KDData, remaining: Sequence[int]) -> list[Variant]:
    return [
        Variant(str(c), "remap", {"remap_to": c, "num_experts": 1}) for c in map(int, values or remaining)
    ]


def projection(values: Sequence[str], data: KDData, remaining: Sequence[int]) -> list[Variant]:
    """All that remap do so to the first remaining class, as the variants without PO and without the
    complement term do."""
    ours = {"erase": {}, "remap": {"remap_to": remaining[0], "num_experts": 1}, "more": {}}
    names = values or ("original", *WITHOUT, *ours)
    return [Variant(name, name, ours.get(name, {})) for name in names]


def routers(values: Sequence[str], data: KDData, remaining: Sequence[int]) -> list[Variant]:
    """Untrained, then trained with every combination of losses, on as many samples as in the paper."""
    epochs = round(SAMPLES_SEEN / len(data.train))
    variants = []
    for n in map(int, values or [n for n in ROUTED if n <= len(remaining)]):
        for router in ("random", "hash", "prototype", "prototype_random"):
            variants.append(Variant(f"{n} {router}", "more", {"num_experts": n, "router": router}))
        for router in ("prototype", "prototype_random"):
            for losses in map("+".join, COMBINATIONS):
                settings = {"num_experts": n, "router": router, "losses": losses, "epochs": epochs}
                variants.append(Variant(f"{n} {router} {losses}", "more-trained", settings))
    return variants


def depth(values: Sequence[str], data: KDData, remaining: Sequence[int]) -> list[Variant]:
    """`values`: modules whose input is edited, by name; `head` for the last layer."""
    ours = {"erase": {"remap_to": None, "router": None}, "remap": {"router": None}, "more": {}}
    variants = []
    for at in values:
        for name, settings in ours.items():
            settings = {"at": None if at == "head" else at, **settings}
            variants.append(Variant(f"{at} {name}", "more-inner", settings))
    return variants


FACTORS = {function.__name__: function for function in (experts, target, projection, routers, depth)}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("factor", choices=FACTORS)
    parser.add_argument("--preset", help="data, classifier and classes of a preset of `bench kd`")
    parser.add_argument("--rehearse", action="store_true", help="run on small stand-ins")
    parser.add_argument("--dataset")
    parser.add_argument("--data", help="where the data lie, if not in their usual place")
    parser.add_argument("--model")
    parser.add_argument("--forget", metavar="CLASS+...")
    values = "numbers of experts, class numbers, methods, or modules; depth needs them"
    parser.add_argument("--values", nargs="+", default=[], help=values)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--epochs", type=int, help="of a training (the recipe's)")
    parser.add_argument("--models", help="folder of trained classifiers (models in --output)")
    parser.add_argument("--output", type=Path, required=True)
    parser.set_defaults(config=None, benchmark="kd")
    args = parser.parse_args()
    if args.factor == "depth" and not args.values:
        parser.error("depth needs the names of modules: --values head features.7 features.6")
    options = read_options(KDOptions, args, dict)
    if options.forget is None:
        parser.error("name the classes to forget together: --forget 3, or --preset")
    if args.rehearse:
        options = rehearse_classes(options, args.output)

    data = load_kd_data(options.dataset, path=options.data)
    (entry,) = [options.forget] if isinstance(options.forget, str) else options.forget
    remaining = split_by_class(data, classes_of(entry, data)).r.labels.unique().tolist()
    # The original's features are the same for every value, and so are a reloaded model's.
    shared = Shared()
    lines, own = [], []
    for variant in FACTORS[args.factor](args.values, data, remaining):
        output = args.output / f"{args.factor}-{variant.label}".replace(" ", "-")
        settings = dict(variant.settings)
        if args.rehearse and "epochs" in settings:
            settings["epochs"] = 1  # of a stand-in so small, thousands are as many samples as in the paper
        own_options = {
            "methods": [variant.method],
            "forget": entry,
            "models": options.models or args.output / "models",
            "tuned": {variant.method: settings},
        }
        summary = run_kd(**options.arguments | own_options, output=output, shared=shared)
        if not summary:  # another process than the first
            continue
        rates = by_rate(read_rows(output / "probes.csv"))
        labelled = [{args.factor: variant.label, **line, **rates[line["method"]]} for line in summary]
        lines += labelled
        own += [line for line in labelled if line["method"] == variant.method]
        if args.rehearse:
            check_filled(summary, [variant.method], OF_CLASSES)
        write_rows(args.output / "sweep.csv", lines)
    if not own:
        return
    write_figure(args.output / "sweep.png", draw(args.factor, own))
    shown = [line for line in lines if not line["method"].endswith(RELOADED)]
    table = markdown_table(shown, [args.factor, "method", *COLUMNS])
    note = "Percent; saved and loaded again: in sweep.csv."
    write_text(args.output / "sweep.md", f"`{portable_command()}`\n\n{note}\n\n{table}\n")
    print(table)


def portable_command() -> str:
    """The command without the folders of the machine that it ran on."""
    arguments = sys.argv[1:]
    before = ["", *arguments[:-1]]
    places = [PLACES.get(flag, value) for flag, value in zip(before, arguments, strict=True)]
    return shlex.join(["python", "benchmarks/kd/sweep.py", *places])


def draw(factor: str, own: Sequence[Mapping[str, Any]]) -> Figure:
    """Harmonic means of the own head, the paper's new head and the converged one, with 95 % intervals."""
    labels = [line[factor] for line in own]
    sideways = max(map(len, labels)) > 3  # long labels stand below each other
    size = (9, 1.5 + 0.22 * len(own)) if sideways else (max(6, 2 + 0.35 * len(own)), 4)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for column in SHOWN:
        centre, ends = with_interval(own, column)
        style = {"label": column, "capsize": 3, "marker": "o", "ms": 4}
        if sideways:
            axis.errorbar(centre, labels, xerr=ends, ls="", **style)
        else:
            axis.errorbar(labels, centre, yerr=ends, **style)
    if sideways:
        axis.set(xlabel="percent", ylabel=factor, xlim=(-1, 103), ylim=(len(own) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.3)
    else:
        axis.set(xlabel=factor, ylabel="percent", ylim=(-1, 103))
    figure.legend(loc="outside upper center", ncols=len(SHOWN))
    return figure


def with_interval(lines: Sequence[Mapping[str, Any]], column: str) -> tuple[list[float], list[list[float]]]:
    """A column's means, and their distances to both ends of the interval."""
    low = [line[column] - line[f"{column}_low"] for line in lines]
    high = [line[f"{column}_high"] - line[column] for line in lines]
    return [line[column] for line in lines], [low, high]


if __name__ == "__main__":
    main()
