"""`more-hf bench kd`: the knowledge-deletion benchmark of classifiers."""

import argparse
import logging
from pathlib import Path

from more_hf.cli.checkpoint import add_device
from more_hf.cli.options import (
    SEVERAL_PROCESSES,
    add_command,
    add_concepts,
    add_solver,
    natural,
    positive,
    refuse_missing_model,
    refuse_unknown,
)
from more_hf.core.request import EXACT_SOLVERS

from ..classes import DATASETS
from ..methods.registry import CLASSIFICATION, classification_groups
from .options import read_settings, start_processes


logger = logging.getLogger(__name__)


def add_to(benches) -> None:
    """Add it to the sub-commands of `bench`."""
    parser = add_command(
        benches,
        "kd",
        _bench_classes,
        purpose="forget classes in turn and measure accuracies, new probes, membership attacks and cost",
        details="Train a classifier, let every method forget classes in turn, and measure what is left.\n"
        "It can be killed at any point and goes on where it was;\n"
        f"{SEVERAL_PROCESSES.format('bench kd')}",
        resumes=True,
        examples=(
            "more-hf bench kd --forget 3 --output DIR",
            "more-hf bench kd --dataset fashion-mnist --methods esc,more --forget all --output DIR",
        ),
    )
    add = parser.add_argument
    add("--dataset", default="digits", help=f"{', '.join(DATASETS)}, or a folder of images (digits)")
    add("--data", type=Path, metavar="DIR", help="where the data lie, if not in their usual place")
    add(
        "--model",
        default="allcnn-narrow",
        help="allcnn, resnet18, vit-base, the same with -narrow (vit-narrow), or a pretrained classifier's "
        "folder or Hub id (allcnn-narrow)",
    )
    add(
        "--methods",
        default="closed-form",
        metavar="A,B",
        help=f"of {', '.join(CLASSIFICATION)}, your own as MODULE:FUNCTION; "
        "or closed-form, all (closed-form)",
    )
    classes = (
        "classes to forget in turn, by name or number, or all; A+B forgets two together; "
        "samples forgets a random tenth of the images"
    )
    add_concepts(parser, "forget", classes, required=True, metavar="CLASS")
    add("--seeds", type=positive, default=1, metavar="K", help="trainings, and runs of each method (1)")
    add(
        "--epochs",
        type=natural,
        metavar="N",
        help="of a training (the recipe's); 0 takes a trained --model as it is",
    )
    add("--probe_seeds", type=positive, default=5, metavar="K", help="new heads for each learning rate (5)")
    add(
        "--passes",
        nargs="+",
        type=positive,
        default=[16],
        metavar="K",
        help="how often an attacker asks a random router (16)",
    )
    add(
        "--num_experts",
        type=positive,
        metavar="N",
        help="for methods with a router (one for each remaining class)",
    )
    add_solver(parser, EXACT_SOLVERS)
    add("--settings", type=Path, metavar="FILE", help="JSON file of the arguments of each method")
    add("--models", type=Path, metavar="DIR", help="folder of trained classifiers (models in --output)")
    add_device(parser, "accelerate's choice")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for rows, tables and plots")


def _bench_classes(args: argparse.Namespace) -> int:
    samples = args.forget == ["samples"]
    methods = _methods(args.methods, samples)
    tuned = read_settings(args.settings)
    refuse_missing_model(args.model)
    if args.dataset in DATASETS and Path(args.dataset).is_dir():
        logger.warning(
            "`--dataset %s` is the built-in data set; for the folder of that name write ./%s.",
            args.dataset,
            args.dataset,
        )
    if not Path(args.dataset).is_dir():
        refuse_unknown([args.dataset], DATASETS, what="data set", also=", or a folder of images")

    from ..classes import run as classes_run
    from ..classes import samples as samples_run
    from ..classes import tables

    state = start_processes(args.device)
    settings = {"num_experts": args.num_experts, "solver": args.solver}
    options = {
        "output": args.output,
        "seeds": args.seeds,
        "path": args.data,
        "models": args.models,
        "epochs": args.epochs,
        "settings": {name: value for name, value in settings.items() if value is not None},
        "tuned": tuned,
    }
    if samples:
        summary = samples_run.run_samples(args.dataset, args.model, methods, **options)
        short_markdown = samples_run.short_markdown
    else:
        forget = "all" if args.forget == ["all"] else args.forget
        options |= {"probe_seeds": args.probe_seeds, "passes": args.passes}
        summary = classes_run.run_kd(args.dataset, args.model, methods, forget, **options)
        short_markdown = tables.short_markdown
    # The other processes have no summary.
    if state.is_main_process:
        print(short_markdown(summary))
        print(f"\nOpen {args.output / 'report.html'}; the tables are in {args.output / 'table.md'}.")
    return 0


def _methods(words: str, samples: bool) -> list[str]:
    """The methods of `--methods`: a group that fits what is forgotten, or names with commas."""
    groups = classification_groups("samples" if samples else "classes")
    methods = groups.get(words) or words.split(",")
    registered = [name for name in methods if ":" not in name]
    refuse_unknown(registered, CLASSIFICATION, what="method", also=f"; or {', '.join(groups)}")
    return methods
