"""`more-hf bench attacks`: what an attacker gets back of what was forgotten."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from more_hf.cli.options import EMOJI_SD, SEVERAL_PROCESSES, add_command, positive, refuse_missing_model
from more_hf.core.request import CLIP
from more_hf.data import CLASSIFIERS

from ..attacks.registry import ATTACKS, attacks_of
from ..classes import DATASETS
from ..methods.registry import CLASSIFICATION, DIFFUSION
from .artists import judges_of, load_pipeline
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


CLASS_METHODS = "remap,more,more-hash,more-reloaded"
PICTURE_METHODS = "more,uce,rece,speed,oce,esd"


@dataclass(frozen=True)
class AttackOptions:
    """What a benchmark of attacks is told, by flags or in a file."""

    model: list | tuple = flag(
        (),
        f"what is attacked: {', '.join(CLASSIFIERS)}, or with --dataset folders or Hub ids; or one pipeline, "
        f"{EMOJI_SD}, or with --prompts a folder or Hub id",
        **{**NAMES, "metavar": "MODEL"},
    )
    methods: str | list | None = flag(
        None, f"your own as MODULE:FUNCTION ({CLASS_METHODS}; of pipelines {PICTURE_METHODS})", metavar="A,B"
    )
    attacks: str | list | None = flag(None, f"of {', '.join(ATTACKS)} (all but membership)", metavar="A,B")
    forget: list | tuple = flag(
        (), "what is forgotten in turn; A+B forgets two together", also="--concept", **NAMES
    )
    seeds: int = key(1, "runs of each method and attack (1)")
    limit: int | None = flag(
        None,
        "the attacker's labelled images of each class; of pipelines each concept's test prompts (all)",
        type=positive,
        metavar="N",
    )
    dataset: str | None = flag(
        None, f"of classifiers: {', '.join(DATASETS)}, or a folder of images (the model's own)"
    )
    data: str | None = key(None, "of classifiers: where the data set lies, if not in its usual place")
    epochs: int | None = flag(
        None, "of Retrain (the recipe's); 0 leaves Retrain out", type=natural, metavar="N"
    )
    models: str | None = flag(None, "folder of Retrain (models in --output)", metavar="DIR")
    prompts: str | None = flag(
        None, f"of pipelines: what is drawn, as of `bench artists` (emoji10 for {EMOJI_SD})", metavar="FILE"
    )
    lessons: str | None = key(
        None,
        "of pipelines: what the attacker's own pictures are drawn from, with the name of what is forgotten\n"
        f"    in the place of others (emoji10_validation for {EMOJI_SD}, else the prompts)",
    )
    targets: str | dict = key(
        "targets_several", "table with the columns forget, remap_to; most methods take the first"
    )
    steps: int | None = key(None, f"denoising steps (10 for {EMOJI_SD}, else 50)")
    guidance: float | int | None = key(None, f"of the pictures (4 for {EMOJI_SD}, else 7.5)")
    batch_size: int = key(20, "pictures per call (20)")
    tuned: dict | None = key(
        None, "method or attack -> its own arguments, or the name of a JSON file of them"
    )


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
            'more-hf bench attacks --model emoji-sd --attacks name,inversion --forget "High Contrast" '
            "--output DIR",
        ),
    )
    add_options(parser, AttackOptions)


def _bench_attacks(args: argparse.Namespace) -> int:
    options = read_options(AttackOptions, args, _of_folder)
    if not options.model or not options.forget:
        raise ValueError("Say what is attacked: `--model MODEL` and `--forget NAME`, or a `--config`.")
    of_pictures = options.prompts is not None or EMOJI_SD in options.model
    known = attacks_of("pictures" if of_pictures else "classes")
    usual = [name for name, attack in known.items() if not attack.on_request]
    of = "pipelines" if of_pictures else "classifiers"
    attacks = split_names(options.attacks or usual, {}, known, what=f"attack on {of}")
    for model in options.model:
        refuse_missing_model(model)
    run = _attack_pictures if of_pictures else _attack_classes
    summary = run(options, attacks, args)

    from ..attacks.tables import short_markdown
    from ..machine import processes

    # The other processes have no summary.
    if processes().is_main_process:
        print(short_markdown(summary))
        print(f"\nThe tables are in {args.output / 'table.md'}.")
    return 0


def _of_folder(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options that made a folder, from its `config.json`."""
    made = data["evaluation"]
    options = {
        "model": list(data["models"]),
        "methods": [name for name in data["methods"] if name not in data["references"]],
        "attacks": list(data["attacks"]),
        "tuned": {**data["methods"], **data["attacks"]},
        "forget": list(data["forget"]),
        "seeds": data["seeds"],
    }
    if data["benchmark"] == "attacks-classes":
        epochs = made["retraining"]["epochs"]
        return {**options, "dataset": made["dataset"], "limit": made["labelled"], "epochs": epochs}
    targets = {concept: erasure["several"] for concept, erasure in data["forget"].items()}
    drawing = {name: made[name] for name in ("prompts", "lessons", "steps", "guidance", "limit")}
    return {**options, **drawing, "targets": targets}


def _attack_classes(options: AttackOptions, attacks: list[str], args: argparse.Namespace) -> list[dict]:
    methods = split_names(options.methods or CLASS_METHODS, {}, CLASSIFICATION, what="method")
    if options.dataset is None:
        others = "; others need `--dataset`"
        refuse_unknown(options.model, CLASSIFIERS, what="packaged classifier", also=others)
    dataset = options.dataset or options.model[0].rpartition("-")[0]

    from ..attacks.classes.run import run_class_attacks

    start_processes(args.device)
    return run_class_attacks(
        dataset,
        options.model,
        methods,
        attacks,
        options.forget,
        output=args.output,
        seeds=options.seeds,
        limit=options.limit,
        path=options.data,
        trainings=options.models,
        epochs=options.epochs,
        tuned=options.tuned,
    )


def _attack_pictures(options: AttackOptions, attacks: list[str], args: argparse.Namespace) -> list[dict]:
    if len(options.model) > 1:
        raise ValueError(f"Name one pipeline; got {', '.join(options.model)}. Run the command for each.")
    (model,) = options.model
    emoji = model == EMOJI_SD
    methods = split_names(options.methods or PICTURE_METHODS, {}, DIFFUSION, what="method")

    from ..artists.prompts import read_prompts, read_targets

    prompts = read_prompts(options.prompts or "emoji10")
    lessons = read_prompts(options.lessons or ("emoji10_validation" if emoji else options.prompts))
    targets = options.targets
    if isinstance(targets, str):
        targets = read_targets(targets)

    from ..attacks.pictures.run import run_picture_attacks

    state = start_processes(args.device)
    pipe, protocol = load_pipeline(model)
    judges = judges_of("emoji" if emoji else "clip", CLIP, prompts, state.device)
    return run_picture_attacks(
        pipe,
        model,
        methods,
        attacks,
        options.forget,
        prompts=prompts,
        lessons=lessons,
        targets=targets,
        judges=judges,
        output=args.output,
        steps=options.steps or protocol["steps"],
        guidance=protocol["guidance"] if options.guidance is None else options.guidance,
        scheduler=protocol["scheduler"],
        batch_size=options.batch_size,
        seeds=options.seeds,
        limit=options.limit,
        tuned=options.tuned,
    )
