"""`more-hf compare`: draw prompts with an erased pipeline and with its original, as one picture."""

import argparse
import logging
from pathlib import Path

from .checkpoint import add_dtype, add_placement, load_pipeline, own_dtype, read_checkpoint
from .options import (
    EMOJI_SD,
    add_command,
    add_import,
    add_text_encoder,
    positive,
    refuse_missing_folder,
    refuse_missing_model,
)
from .request import drawing_options


logger = logging.getLogger(__name__)


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "compare",
        _compare,
        purpose="draw prompts with an erased pipeline and with its original, as one picture",
        details="Rows: before, after, and target, the prompt with the forgotten name's target in its place.\n"
        "Where the original is not here there is only after: what is erased does not hold it.",
        examples=(
            'more-hf compare DIR --prompts "a fish in the style of Blobmoji" --original emoji-sd',
            'more-hf compare erased.safetensors --prompts "a house by Van Gogh" --text_encoder FOLDER',
        ),
    )
    add = parser.add_argument
    add(
        "erased",
        metavar="DIR_OR_FILE",
        help="a folder or file that `more-hf erase`, `more_hf.save` or `more_hf.save_checkpoint` wrote",
    )
    add_import(parser)
    add_text_encoder(parser)
    add("--prompts", nargs="+", action="extend", required=True, metavar="PROMPT", help="one column each")
    add(
        "--original",
        metavar="MODEL",
        help=f"what it was erased from: a folder, a file, a Hub id, or {EMOJI_SD} (what its record says, if "
        "that is here)",
    )
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
    if not Path(args.erased).is_file():
        refuse_missing_folder(args.erased, "`compare` reads what `more-hf erase` or `more_hf.save` wrote.")
    if args.original is not None:
        refuse_missing_model(args.original)
        if _is_erased(args.original):
            raise ValueError(f"{args.original} is erased, too. Name the original model.")
    erased = read_checkpoint(args.erased)

    import more_hf

    # Both in one dtype, so that its rounding is not taken for the edit.
    options = {"dtype": args.dtype or own_dtype(erased), "device": args.device, "offload": args.offload}
    options["text_encoder"] = args.text_encoder
    pipe = load_pipeline(erased, **options, erased=True)
    base, erasure = args.original, more_hf.get_erasure(pipe)
    recorded = "" if erasure is None else erasure.facts.base
    if base is None and _is_here(recorded) and not _is_erased(recorded):
        base = recorded
    original = None if base is None else load_pipeline(read_checkpoint(base), **options)
    logger.info("Drawing %d prompts", len(args.prompts))
    settings = {"original": original, "seed": args.seed, **drawing_options(args)}
    picture = more_hf.compare(pipe, args.prompts, **settings)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    print(f"Open {args.output}.")
    return 0


def _is_here(model: str) -> bool:
    """Whether a model that a record names can be loaded without a download."""
    return model == EMOJI_SD or bool(model) and Path(model).exists()


def _is_erased(model: str) -> bool:
    """Whether a folder or file says that it was saved erased."""
    from more_hf.core.record import RECORD  # imports torch
    from more_hf.saving.tensor_file import read_tensor_file

    path = Path(model)
    return read_tensor_file(path).note is not None if path.is_file() else (path / RECORD).is_file()
