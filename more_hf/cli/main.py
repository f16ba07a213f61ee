"""The `more-hf` command. Heavy imports happen inside the commands, so that `--help` is instant."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

from tqdm import tqdm

from more_hf import __version__
from more_hf.core.errors import MoreError

from . import compare, erase, erase_classes, evaluate, lora, push, tune, verify
from .options import import_module_of_user, show_examples


COMMANDS = (erase, erase_classes, tune, compare, evaluate, lora, verify, push)
OTHERS = "more_hf.commands"  # entry points of modules with a command: the benchmarks' `demo` and `bench`
BENCH = ("concept_erasure", "matplotlib", "sklearn")  # the packages of the extra `bench`


def main(argv: list[str] | None = None) -> int:
    """
    Run one command, by default with the process's own arguments, and return its exit status.

    Returns:
        `int`: 0 for success, 1 if `verify` found a difference or a benchmark went on without a method that
        failed, 2 for an expected failure, which is reported in one line on stderr (or raised, with
        `MORE_HF_DEBUG=1`), 130 if the command was interrupted.

    Raises:
        SystemExit: from argparse, for `--help`, `--version` and unknown arguments.
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        with stages_shown():
            for name in vars(args).get("modules", ()):
                import_module_of_user(name)
            return args.run(args)
    except KeyboardInterrupt:
        print(f"Interrupted. {_after_interrupt(args)}", file=sys.stderr)
        return 130
    except (MoreError, OSError, ValueError, ModuleNotFoundError) as error:
        is_bug = isinstance(error, ModuleNotFoundError) and error.name.split(".")[0] not in BENCH
        if is_bug or os.environ.get("MORE_HF_DEBUG") == "1":
            raise
        hint = " Install what the benchmarks need: pip install 'more_hf[bench]'."
        text = f"{error}.{hint}" if isinstance(error, ModuleNotFoundError) else str(error)
        print(f"Error: {' '.join(text.split())}", file=sys.stderr)
        return error.exit_status if isinstance(error, MoreError) else 2


class _AboveBars(logging.Handler):
    """Writes lines above the progress bars without breaking them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def stages_shown() -> Iterator[None]:
    """Show what the library and the benchmarks log; of several processes, only the first reports stages."""
    handler = _AboveBars()
    is_first = os.environ.get("RANK", "0") == "0"
    packages = [logging.getLogger(name) for name in ("more_hf", "more_hf_bench")]
    before = [(package.level, package.propagate) for package in packages]
    for package in packages:
        package.addHandler(handler)
        package.setLevel(logging.INFO if is_first else logging.WARNING)
        package.propagate = False
    try:
        yield
    finally:
        for package, (level, propagate) in zip(packages, before, strict=True):
            package.removeHandler(handler)
            package.setLevel(level)
            package.propagate = propagate


def _after_interrupt(args: argparse.Namespace) -> str:
    """Say in which state an interruption leaves the output."""
    if args.resumes:
        return "Run the same command again to continue."
    output = vars(args).get("output")
    if output is None or not output.exists():
        return "Nothing was written."
    return f"{output} is as it was, or holds a part of the result: run the same command again."


def parse(argv: list[str]) -> argparse.Namespace:
    """
    Parse the arguments after the program's name; in the result, `run` is the command's function. Flags may
    have dashes for underscores (`--remap-to`).
    """
    parser = argparse.ArgumentParser(
        "more-hf",
        description="Erase concepts from text-to-image pipelines, and classes from classifiers.",
        epilog=show_examples(
            (
                "more-hf demo",
                "more-hf erase emoji-sd --concept Blobmoji --remap_to Fluent --output without_blobmoji",
            )
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"more-hf {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for module in (*COMMANDS, *(point.load() for point in entry_points(group=OTHERS))):
        module.add_to(commands)
    return parser.parse_args([_with_underscores(argument) for argument in argv])


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument[2:].partition("=")
    return f"--{flag.replace('-', '_')}{equals}{value}"
