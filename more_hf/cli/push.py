"""`more-hf push`: publish a saved pipeline."""

import argparse
import csv
from pathlib import Path


def add_commands(commands) -> None:
    """Add it to the parser's sub-commands."""
    push = commands.add_parser(
        "push",
        help="publish a saved pipeline with a model card",
        description="Check a folder that `more-hf erase` wrote against its record, write a model card, and upload all of it in one commit.",
    )
    push.add_argument("folder", metavar="DIR", type=Path, help="a folder that `more-hf erase` or `more_hf.save` wrote")
    push.add_argument("repo_id", metavar="NAME/REPO", help="a repository on the Hub; created if need be")
    push.add_argument("--private", action="store_true", default=None, help="if the repository is created (the account's setting)")
    push.add_argument("--revision", metavar="BRANCH", help="created if need be (main)")
    push.add_argument("--commit_message", metavar="TEXT", help="(names what was erased)")
    push.add_argument("--include_delta", action="store_true", help="publish the factors of the edit too, which give the original back")
    push.add_argument("--no_card", dest="card", action="store_false", help="leave the README.md as it is")
    push.add_argument("--grid", metavar="FILE", type=Path, help="a picture of before and after, for the card")
    push.add_argument("--rows", metavar="FILE", type=Path, help="a CSV file of results, such as a benchmark's summary.csv, for the card")
    push.add_argument("--dry_run", metavar="DIR", type=Path, help="write there what would be pushed, and push nothing")
    push.set_defaults(run=_push)


def _push(args: argparse.Namespace) -> int:
    rows = None if args.rows is None else _read_rows(args.rows)

    import more_hf

    names = ("private", "revision", "commit_message", "include_delta", "card", "grid", "dry_run")
    done = more_hf.push_to_hub(args.folder, args.repo_id, rows=rows, **{name: getattr(args, name) for name in names})
    print(f"Pushed to https://huggingface.co/{args.repo_id}" if args.dry_run is None else f"Nothing was pushed; look at {done}.")
    return 0


def _read_rows(file: Path) -> list[dict[str, str | float]]:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows:
        raise ValueError(f"{file} has no rows.")
    return [{column: _value(cell) for column, cell in row.items()} for row in rows]


def _value(cell: str) -> str | float:
    try:
        return int(cell) if cell.isdecimal() else float(cell)
    except ValueError:
        return cell
