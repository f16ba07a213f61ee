"""`more-hf verify`: check a saved model's files against its record."""

import argparse
from pathlib import Path

from .options import add_command, add_import, add_text_encoder, refuse_missing_folder


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "verify",
        _verify,
        purpose="check a saved model's files against its record",
        details="Exits with 1 if a check fails.",
        examples=(
            "more-hf verify to_push --run && echo ready",
            "more-hf verify downloaded --rerun --base CompVis/stable-diffusion-v1-4",
        ),
    )
    add_import(parser)
    add = parser.add_argument
    add("folder", metavar="DIR_OR_FILE", help="a folder or file that `more-hf erase` or `more_hf.save` wrote")
    add_text_encoder(parser)
    add(
        "--run",
        dest="runs_model",  # `run` is the command's function
        action="store_true",
        help="also load the denoiser and run it: nothing but the edited layers may read the prompt",
    )
    add(
        "--rerun",
        action="store_true",
        help="also erase again from the original, and compare every tensor: bit for bit, or how far apart",
    )
    add("--base", metavar="MODEL", help="that original: a folder, or a Hub id (as the record says)")


def _verify(args: argparse.Namespace) -> int:
    in_one_file = Path(args.folder).is_file()
    if not in_one_file:
        refuse_missing_folder(args.folder, "`verify` reads what `more-hf erase` or `more_hf.save` wrote.")
    if in_one_file and (args.runs_model or args.rerun):
        raise ValueError("`--run` and `--rerun` load a folder, and this is one file. Leave them out.")

    import more_hf

    if in_one_file:
        result = more_hf.verify_file(args.folder, text_encoder=args.text_encoder)
    else:
        result = more_hf.verify(args.folder, run=args.runs_model, rerun=args.rerun, base=args.base)
    print(result.to_markdown())
    return 0 if result.ok else 1
