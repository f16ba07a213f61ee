"""The `more-hf` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

import argparse
import os
import sys

from more_hf.cli import bench, pipelines
from more_hf.cli import erase_classes as classes
from more_hf.cli import push as publish
from more_hf.core.errors import MoreError


def main(argv: list[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`list[str]`, *optional*):
            The arguments after the program's name. Defaults to the process's own.

    Returns:
        `int`: 0 for success, 1 if `verify` found a difference, 2 for an expected failure, told in one line on stderr
        (with `MORE_HF_DEBUG=1` it is raised instead).

    Raises:
        SystemExit: from argparse, for `--help` and for arguments it does not know.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (MoreError, OSError, ValueError) as error:
        if os.environ.get("MORE_HF_DEBUG") == "1":
            raise
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    purpose = "Erase concepts from text-to-image pipelines, and classes from image classifiers."
    parser = argparse.ArgumentParser("more-hf", description=purpose)
    commands = parser.add_subparsers(metavar="command", required=True)
    for module in (pipelines, classes, publish, bench):
        module.add_commands(commands)
    return parser
