"""`more-hf bench kd`: the knowledge-deletion benchmark of classifiers."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from more_hf.cli.options import SEVERAL_PROCESSES, add_command, positive, refuse_missing_model

from ..classes import DATASETS
from ..methods.registry import CLASSIFICATION, classification_groups, methods_that_forget
from .options import (
    NAMES,
    add_options,
    flag,
    key,
    natural,
    read_options,
    refuse_unknown,
    split_names,
    start_processes,
)
from .rehearse import OF_CLASSES, OF_SAMPLES, check_filled, rehearse_classes


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KDOptions:
    """What a benchmark of classes or samples is told, by flags or in a file."""

    dataset: str = flag("digits", f"{', '.join(DATASETS)}, or a folder of images (digits)")
    data: str | None = flag(None, "where the data lie, if not in their usual place", metavar="DIR")
    model: str = flag(
        "allcnn-narrow",
        "allcnn, resnet18, vit-base, the same with -narrow (vit-narrow), or a pretrained classifier's folder "
        "or Hub id (allcnn-narrow)",
    )
    methods: str | list = flag(
        "closed-form",
        f"of {', '.join(CLASSIFICATION)}, your own as MODULE:FUNCTION; or closed-form, all (closed-form)",
        metavar="A,B",
    )
    forget: str | list | None = flag(
        None,
        "classes to forget in turn, by name or number, or all; A+B forgets two together; samples forgets a "
        "random tenth of the images",
        also="--concept",
        **{**NAMES, "metavar": "CLASS"},
    )
    fraction: float = key(0.1, "of the images that samples forgets (0.1)")
    seeds: int = flag(1, "trainings, and runs of each method (1)", type=positive, metavar="K")
    epochs: int | None = flag(
        None, "of a training (the recipe's); 0 takes a trained --model as it is", type=natural, metavar="N"
    )
    learning_rate: float | int | None = flag(None, "of a training (the recipe's)", type=float, metavar="RATE")
    num_workers: int = flag(0, "processes that decode images (0)", type=natural, metavar="N")
    mixed_precision: str | None = flag(
        None, "of a training on CUDA (as accelerate is configured)", choices=("no", "bf16", "fp16")
    )
    probe_seeds: int = key(5, "new heads for each learning rate (5)")
    passes: list | tuple = key((16,), "how often an attacker asks a random router, a list ([16])")
    num_experts: int | None = flag(
        None, "for methods with a router (one for each remaining class)", type=positive, metavar="N"
    )
    models: str | None = flag(None, "folder of trained classifiers (models in --output)", metavar="DIR")
    settings: dict | None = key(None, "arguments for all methods that take them: solver, ...")
    tuned: dict | None = key(None, "method -> its own arguments, or the name of a JSON file of them")

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as `run_kd` takes them."""
        given = {**vars(self), "path": self.data}
        return {name: value for name, value in given.items() if name not in ("data", "num_experts")}


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
            "more-hf bench kd --preset table1-cifar10 --rehearse --output DIR",
        ),
    )
    add_options(parser, KDOptions, "kd")


def _bench_classes(args: argparse.Namespace) -> int:
    options = read_options(KDOptions, args, _of_folder)
    if args.rehearse:
        options = rehearse_classes(options, args.output)
    if options.forget is None:
        raise ValueError("Say what to forget: `--forget CLASS`, `--forget all` or `--forget samples`.")
    forgets = "samples" if options.forget in ("samples", ["samples"]) else "classes"
    methods = split_names(
        options.methods, classification_groups(forgets), methods_that_forget(forgets), what="method"
    )
    refuse_missing_model(options.model)
    dataset = options.dataset
    if dataset in DATASETS and Path(dataset).is_dir():
        logger.warning(
            "`--dataset %s` is the built-in data set; for the folder of that name write ./%s.",
            dataset,
            dataset,
        )
    if not Path(dataset).is_dir():
        refuse_unknown([dataset], DATASETS, what="data set", also=", or a folder of images")

    from ..classes import run, tables

    state = start_processes(args.device)
    settings = dict(options.settings or {})
    if options.num_experts is not None:
        settings["num_experts"] = options.num_experts
    summary = run.run_kd(**options.arguments | {"methods": methods, "settings": settings}, output=args.output)
    # The other processes have no summary.
    if state.is_main_process:
        if args.rehearse:
            check_filled(summary, methods, OF_SAMPLES if forgets == "samples" else OF_CLASSES)
        print(tables.short_markdown(summary))
        print(f"\nOpen {args.output / 'report.html'}; the tables are in {args.output / 'table.md'}.")
    return 0


def _of_folder(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options that made a folder, from its `config.json`."""
    training, samples = data["training"], data["benchmark"] == "kd-samples"
    return {
        "dataset": training["dataset"],
        "model": training["model"],
        "epochs": training["recipe"]["epochs"],
        "learning_rate": training["recipe"]["learning_rate"],
        "methods": list(data["methods"]),
        "tuned": data["methods"],
        "forget": "samples" if samples else list(data["forget"]),
        "seeds": data["seeds"],
        **data["evaluation"],
    }
