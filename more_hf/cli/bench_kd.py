"""`more-hf bench kd`: the knowledge-deletion benchmark."""

import argparse
import json
from pathlib import Path

from more_hf.bench.methods import ABLATIONS, CLASSES_ONLY, CLASSIFICATION, CLOSED_FORM, SAMPLES_ONLY

from .options import natural, positive


def add_bench_kd(benches) -> None:
    """Add it to the sub-commands of `bench`."""
    parser = benches.add_parser(
        "kd",
        help="forget classes in turn and measure accuracies, new probes, membership attacks and cost",
        description="Train a classifier, let every method forget classes in turn, and measure what is left. It can be killed at any point "
        "and goes on where it was; `accelerate launch -m more_hf bench kd ...` splits the work over processes.",
    )
    names = "digits, fashion-mnist, emoji-100, cifar10, cifar100, tiny-imagenet, imagenet-1k, or a folder of images"
    parser.add_argument("--dataset", default="digits", help=f"{names} (digits)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the data lie, if not in their usual place")
    model = "allcnn, resnet18, vit-base, the same with -narrow (vit-narrow), or a pretrained classifier's folder or Hub id"
    parser.add_argument("--model", default="allcnn-narrow", help=f"{model} (allcnn-narrow)")
    parser.add_argument("--methods", default="closed-form", metavar="A,B", help=f"of {', '.join(CLASSIFICATION)}; or closed-form, all")
    erased = "classes to forget in turn, by name or number, or all; A+B forgets two together; samples forgets a random tenth of the images"
    parser.add_argument("--forget", nargs="+", action="extend", required=True, metavar="CLASS", help=erased)
    parser.add_argument("--seeds", type=positive, default=1, metavar="K", help="trainings, and runs of each method (1)")
    parser.add_argument("--epochs", type=natural, metavar="N", help="of a training (the recipe's); 0 takes a trained --model as it is")
    parser.add_argument("--probe_seeds", type=positive, default=5, metavar="K", help="new heads for each learning rate (5)")
    asked = "how often an attacker asks a random router (16)"
    parser.add_argument("--passes", nargs="+", type=positive, default=[16], metavar="K", help=asked)
    parser.add_argument("--num_experts", type=positive, metavar="N", help="for methods with a router (one for each remaining class)")
    parser.add_argument("--solver", choices=("auto", "pinv", "covariance"), help="(auto)")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="JSON, method to its arguments")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of trained classifiers (models in --output)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for rows, tables and plots")
    parser.set_defaults(run=_bench_kd)


def _bench_kd(args: argparse.Namespace) -> int:
    from more_hf.bench.classes import run as kd
    from more_hf.bench.classes import samples as kd_samples
    from more_hf.bench.classes import tables as kd_outputs
    from more_hf.bench.machine import processes

    samples = args.forget == ["samples"]
    every = tuple(name for name in CLASSIFICATION if name not in (*SAMPLES_ONLY, *ABLATIONS))
    groups = {"closed-form": ("original", *CLOSED_FORM), "all": every}
    if samples:
        groups = {"closed-form": ("original", "esc", *SAMPLES_ONLY), "all": tuple(n for n in CLASSIFICATION if n not in CLASSES_ONLY)}
    methods = groups.get(args.methods) or args.methods.split(",")
    options = {
        "output": args.output,
        "seeds": args.seeds,
        "path": args.data,
        "models": args.models,
        "epochs": args.epochs,
        "settings": {name: vars(args)[name] for name in ("num_experts", "solver") if vars(args)[name] is not None},
        "tuned": json.loads(args.settings.read_text("utf-8")) if args.settings else None,
    }
    if samples:
        summary = kd_samples.run_samples(args.dataset, args.model, methods, **options)
    else:
        forget = "all" if args.forget == ["all"] else args.forget
        options |= {"probe_seeds": args.probe_seeds, "passes": args.passes}
        summary = kd.run_kd(args.dataset, args.model, methods, forget, **options)
    if processes().is_main_process:
        print((kd_samples if samples else kd_outputs).short_markdown(summary))
        print(f"\nOpen {args.output / 'report.html'}; the tables are in {args.output / 'table.md'}.")
    return 0
