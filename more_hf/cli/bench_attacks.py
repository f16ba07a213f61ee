"""`more-hf bench attacks`: what an attacker gets back of what was forgotten."""

import argparse
import logging
from pathlib import Path

from more_hf.bench.attacks.registry import ATTACKS, attacks_of
from more_hf.bench.classes import DATASETS
from more_hf.bench.methods.registry import CLASSIFICATION
from more_hf.data import CLASSIFIERS

from .options import (
    SEVERAL_PROCESSES,
    add_command,
    natural,
    positive,
    read_settings,
    refuse_missing_model,
    refuse_unknown,
)


logger = logging.getLogger(__name__)

CLASS_METHODS = "remap,more,more-hash,more-reloaded"


def add_to(benches) -> None:
    """Add it to the sub-commands of `bench`."""
    parser = add_command(
        benches,
        "attacks",
        _bench_attacks,
        purpose="attack what methods made a model forget, and the original for comparison",
        details="It can be killed at any point and goes on where it was;\n"
        f"{SEVERAL_PROCESSES.format('bench attacks')}",
        resumes=True,
        examples=(
            "more-hf bench attacks --model digits-allcnn --methods more --forget 3 --output DIR",
            "more-hf bench attacks --model fashion-mnist-vit --attacks probes --forget Coat --output DIR",
        ),
    )
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        action="extend",
        required=True,
        metavar="MODEL",
        help=f"what is attacked: {', '.join(CLASSIFIERS)}, or with --dataset folders or Hub ids",
    )
    add("--methods", metavar="A,B", help=f"your own as MODULE:FUNCTION ({CLASS_METHODS})")
    add("--attacks", metavar="A,B", help=f"of {', '.join(ATTACKS)} (all)")
    add(
        "--forget",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME",
        help="what is forgotten in turn; A+B forgets two together",
    )
    add("--seeds", type=positive, default=1, metavar="K", help="runs of each method and attack (1)")
    add("--settings", type=Path, metavar="FILE", help="JSON file of the arguments of each method and attack")
    classes = parser.add_argument_group("classifiers")
    classes.add_argument("--dataset", help=f"{', '.join(DATASETS)}, or a folder of images (the model's own)")
    classes.add_argument("--data", type=Path, metavar="DIR", help="where it lies, if not in its usual place")
    classes.add_argument(
        "--limit", type=positive, metavar="N", help="the attacker's labelled images of each class (all)"
    )
    classes.add_argument(
        "--epochs", type=natural, metavar="N", help="of Retrain (the recipe's); 0 leaves Retrain out"
    )
    classes.add_argument("--models", type=Path, metavar="DIR", help="folder of Retrain (models in --output)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for rows, tables and the picture")


def _bench_attacks(args: argparse.Namespace) -> int:
    known = attacks_of("classes")
    attacks = list(known) if args.attacks is None else args.attacks.split(",")
    refuse_unknown(attacks, known, what="attack on classifiers")
    methods = (args.methods or CLASS_METHODS).split(",")
    registered = [name.removesuffix("-reloaded") for name in methods if ":" not in name]
    refuse_unknown(registered, CLASSIFICATION, what="method")
    for model in args.model:
        refuse_missing_model(model)
    if args.dataset is None:
        refuse_unknown(args.model, CLASSIFIERS, what="packaged classifier", also="; others need `--dataset`")
    dataset = args.dataset or args.model[0].rpartition("-")[0]

    from more_hf.bench.attacks.classes.run import run_class_attacks
    from more_hf.bench.attacks.tables import short_markdown
    from more_hf.bench.machine import describe, processes

    state = processes()
    logger.info("%s", describe(state))
    summary = run_class_attacks(
        dataset,
        args.model,
        methods,
        attacks,
        args.forget,
        output=args.output,
        seeds=args.seeds,
        limit=args.limit,
        path=args.data,
        trainings=args.models,
        epochs=args.epochs,
        tuned=read_settings(args.settings),
    )
    # The other processes have no summary.
    if state.is_main_process:
        print(short_markdown(summary))
        print(f"\nThe tables are in {args.output / 'table.md'}.")
    return 0
