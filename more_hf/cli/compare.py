"""`more-hf compare`: draw prompts with an erased pipeline and with its original, as one picture."""

import argparse
import logging
from pathlib import Path

from .checkpoint import add_dtype, add_placement, load_pipeline, own_dtype, read_checkpoint
from .options import (
    EMOJI_SD,
    add_command,
    add_import,
    positive,
    refuse_missing_folder,
    refuse_missing_model,
)


logger = logging.getLogger(__name__)


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "compare",
        _compare,
        purpose="draw prompts with an erased pipeline and with its original, as one picture",
        details="Rows: before, after, and target, the prompt with the forgotten name's target in its place.\n"
        "Without --original there is only after: an erased folder does not hold the original.",
        examples=(
            'more-hf compare DIR --prompts "a fish in the style of Blobmoji" --original emoji-sd',
            'more-hf compare DIR --prompts "a house by Van Gogh" "a house" --output grid.png',
        ),
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="a folder that `more-hf erase` or `more_hf.save` wrote")
    add_import(parser)
    add("--prompts", nargs="+", action="extend", required=True, metavar="PROMPT", help="one column each")
    add("--original", metavar="MODEL", help=f"what it was erased from: a folder, a Hub id, or {EMOJI_SD}")
    add("--steps", type=positive, help="denoising steps (the pipeline's default)")
    add("--guidance", type=float, help="classifier-free guidance (the pipeline's default)")
    add("--seed", type=int, default=0, help="of the first prompt; the others count up (0)")
    add_dtype(parser)
    add_placement(parser)
    add(
        "--output",
        type=Path,
        default=Path("compare.png"),
        metavar="FILE",
        help="where to write the picture (compare.png)",
    )


def _compare(args: argparse.Namespace) -> int:
    refuse_missing_folder(args.folder, "`compare` reads what `more-hf erase` or `more_hf.save` wrote.")
    if args.original is not None:
        refuse_missing_model(args.original)

        from more_hf.core.record import RECORD  # imports torch

        if (Path(args.original) / RECORD).is_file():
            raise ValueError(f"{args.original} is erased, too (it has a {RECORD}). Name the original model.")

    erased = read_checkpoint(args.folder)

    import more_hf

    # Both in one dtype, so that its rounding is not taken for the edit.
    options = {"dtype": args.dtype or own_dtype(erased), "device": args.device, "offload": args.offload}
    pipe = load_pipeline(erased, **options, erased=True)
    original = None
    if args.original is not None:
        original = load_pipeline(read_checkpoint(args.original), **options)
    logger.info("Drawing %d prompts", len(args.prompts))
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    picture = more_hf.compare(
        pipe,
        args.prompts,
        original=original,
        seed=args.seed,
        **{name: value for name, value in settings.items() if value is not None},
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    print(f"Open {args.output}.")
    return 0
