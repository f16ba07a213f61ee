"""`more-hf push`: publish a saved model."""

import argparse
from pathlib import Path

from .options import add_command, add_import, refuse_missing_folder


PASSED_ON = ("private", "revision", "include_delta", "card", "grid", "dry_run")


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "push",
        _push,
        purpose="publish a saved model with a model card",
        details="Check a folder that `more-hf erase` wrote against its record, write a model card,\n"
        "and upload all of it in one commit.",
        examples=(
            "more-hf push without_blobmoji me/emoji-sd-without-blobmoji --dry_run to_push",
            "more-hf push without_blobmoji me/emoji-sd-without-blobmoji --private",
        ),
    )
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="a folder that `more-hf erase` or `more_hf.save` wrote")
    add_import(parser)
    add("repo_id", metavar="NAME/REPO", help="a repository on the Hub; created if need be")
    add(
        "--private",
        action="store_true",
        default=None,
        help="if the repository is created (the account's setting)",
    )
    add("--revision", metavar="BRANCH", help="created if need be (main)")
    add(
        "--include_delta",
        action="store_true",
        help="publish the factors of the edit too, which give the original back",
    )
    add("--no_card", dest="card", action="store_false", help="leave the README.md as it is")
    add("--grid", metavar="FILE", type=Path, help="a picture of before and after, for the card")
    add("--dry_run", metavar="DIR", type=Path, help="write there what would be pushed, and push nothing")


def _push(args: argparse.Namespace) -> int:
    refuse_missing_folder(args.folder, "`push` reads what `more-hf erase` or `more_hf.save` wrote.")

    import more_hf

    options = {name: getattr(args, name) for name in PASSED_ON}
    done = more_hf.push_to_hub(args.folder, args.repo_id, **options)
    if args.dry_run is None:
        print(f"Pushed to https://huggingface.co/{args.repo_id}")
    else:
        print(f"Nothing was pushed; look at {done}.")
    return 0
