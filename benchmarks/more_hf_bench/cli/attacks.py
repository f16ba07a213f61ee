"""`more-hf bench attacks`: what an attacker gets back of what was forgotten."""

import argparse
from pathlib import Path

from more_hf.cli.checkpoint import add_device
from more_hf.cli.options import (
    EMOJI_SD,
    SEVERAL_PROCESSES,
    add_command,
    add_concepts,
    natural,
    positive,
    refuse_missing_model,
    refuse_unknown,
)
from more_hf.data import CLASSIFIERS

from ..attacks.registry import ATTACKS, attacks_of
from ..classes import DATASETS
from ..methods.registry import CLASSIFICATION, DIFFUSION
from .artists import CLIP
from .options import read_settings, start_processes


CLASS_METHODS = "remap,more,more-hash,more-reloaded"
PICTURE_METHODS = "more,uce,rece,speed,oce,esd"


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
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        action="extend",
        required=True,
        metavar="MODEL",
        help=f"what is attacked: {', '.join(CLASSIFIERS)}, or with --dataset folders or Hub ids; or one "
        f"pipeline, {EMOJI_SD}, or with --prompts a folder or Hub id",
    )
    add(
        "--methods",
        metavar="A,B",
        help=f"your own as MODULE:FUNCTION ({CLASS_METHODS}; of pipelines {PICTURE_METHODS})",
    )
    add("--attacks", metavar="A,B", help=f"of {', '.join(ATTACKS)} (all but membership)")
    add_concepts(parser, "forget", "what is forgotten in turn; A+B forgets two together", required=True)
    add("--seeds", type=positive, default=1, metavar="K", help="runs of each method and attack (1)")
    add("--settings", type=Path, metavar="FILE", help="JSON file of the arguments of each method and attack")
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="the attacker's labelled images of each class; of pipelines each concept's test prompts (all)",
    )
    classes = parser.add_argument_group("classifiers")
    classes.add_argument("--dataset", help=f"{', '.join(DATASETS)}, or a folder of images (the model's own)")
    classes.add_argument("--data", type=Path, metavar="DIR", help="where it lies, if not in its usual place")
    classes.add_argument(
        "--epochs", type=natural, metavar="N", help="of Retrain (the recipe's); 0 leaves Retrain out"
    )
    classes.add_argument("--models", type=Path, metavar="DIR", help="folder of Retrain (models in --output)")
    pictures = parser.add_argument_group("pipelines")
    pictures.add_argument(
        "--prompts", metavar="FILE", help=f"what is drawn, as of `bench artists` (emoji10 for {EMOJI_SD})"
    )
    pictures.add_argument(
        "--lessons",
        metavar="FILE",
        help="what the attacker's own pictures are drawn from, with the name of what is forgotten in the "
        f"place of others (emoji10_validation for {EMOJI_SD}, else --prompts)",
    )
    pictures.add_argument(
        "--targets",
        default="targets_several",
        metavar="FILE",
        help="table with the columns forget, remap_to; most methods take the first (the packaged one)",
    )
    pictures.add_argument("--steps", type=positive, help=f"denoising steps (10 for {EMOJI_SD}, else 50)")
    pictures.add_argument("--guidance", type=float, help=f"of the pictures (4 for {EMOJI_SD}, else 7.5)")
    pictures.add_argument("--batch_size", type=positive, default=20, help="pictures per call (20)")
    add_device(parser, "accelerate's choice")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for rows, tables and pictures")


def _bench_attacks(args: argparse.Namespace) -> int:
    of_pictures = args.prompts is not None or EMOJI_SD in args.model
    known = attacks_of("pictures" if of_pictures else "classes")
    usual = [name for name, attack in known.items() if not attack.on_request]
    attacks = usual if args.attacks is None else args.attacks.split(",")
    refuse_unknown(attacks, known, what=f"attack on {'pipelines' if of_pictures else 'classifiers'}")
    for model in args.model:
        refuse_missing_model(model)
    run = _attack_pictures if of_pictures else _attack_classes
    summary = run(args, attacks)

    from ..attacks.tables import short_markdown
    from ..machine import processes

    # The other processes have no summary.
    if processes().is_main_process:
        print(short_markdown(summary))
        print(f"\nThe tables are in {args.output / 'table.md'}.")
    return 0


def _attack_classes(args: argparse.Namespace, attacks: list[str]) -> list[dict]:
    methods = (args.methods or CLASS_METHODS).split(",")
    registered = [name.removesuffix("-reloaded") for name in methods if ":" not in name]
    refuse_unknown(registered, CLASSIFICATION, what="method")
    if args.dataset is None:
        refuse_unknown(args.model, CLASSIFIERS, what="packaged classifier", also="; others need `--dataset`")
    dataset = args.dataset or args.model[0].rpartition("-")[0]

    from ..attacks.classes.run import run_class_attacks

    start_processes(args.device)
    return run_class_attacks(
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


def _attack_pictures(args: argparse.Namespace, attacks: list[str]) -> list[dict]:
    if len(args.model) > 1:
        raise ValueError(f"Name one pipeline; got {', '.join(args.model)}. Run the command for each.")
    (model,) = args.model
    emoji = model == EMOJI_SD
    methods = (args.methods or PICTURE_METHODS).split(",")
    refuse_unknown([name for name in methods if ":" not in name], DIFFUSION, what="method")

    from ..artists.prompts import read_prompts, read_targets

    prompts = read_prompts(args.prompts or "emoji10")
    lessons = read_prompts(args.lessons or ("emoji10_validation" if emoji else args.prompts))
    targets = read_targets(args.targets)

    from diffusers import DiffusionPipeline

    import more_hf

    from ..artists.judges import ClipJudges, EmojiJudges
    from ..artists.run import EMOJI, FIELD
    from ..attacks.pictures.run import run_picture_attacks

    state = start_processes(args.device)
    if emoji:
        pipe, protocol, judges = more_hf.load_emoji_sd(), EMOJI, EmojiJudges(state.device)
    else:
        pipe, protocol = DiffusionPipeline.from_pretrained(model), FIELD
        clip, weights = CLIP
        judges = ClipJudges.load(prompts.rows, model=clip, pretrained=weights, device=state.device)
    return run_picture_attacks(
        pipe,
        model,
        methods,
        attacks,
        args.forget,
        prompts=prompts,
        lessons=lessons,
        targets=targets,
        judges=judges,
        output=args.output,
        steps=args.steps or protocol["steps"],
        guidance=protocol["guidance"] if args.guidance is None else args.guidance,
        scheduler=protocol["scheduler"],
        batch_size=args.batch_size,
        seeds=args.seeds,
        limit=args.limit,
        tuned=read_settings(args.settings),
    )
