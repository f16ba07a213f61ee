"""The `more-hf` command. Heavy imports happen inside the commands, so that `--help` is instant."""

import argparse
import os
import sys
from importlib.metadata import entry_points

from more_hf import __version__
from more_hf.core.errors import MoreError

from . import compare, erase, erase_classes, lora, push, verify
from .options import import_module_of_user, show_examples
from .progress import stages_shown


COMMANDS = (erase, erase_classes, compare, lora, verify, push)
OTHERS = "more_hf.commands"  # entry points of modules with a command: the benchmarks' `demo` and `bench`
BENCH = ("concept_erasure", "matplotlib", "sklearn")  # the packages of the extra `bench`


def main(argv: list[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`list[str]`, *optional*):
            The arguments after the program's name. Defaults to the process's own.

    Returns:
        `int`: 0 for success, 1 if `verify` found a difference, 2 for an expected failure, which is reported
        in one line on stderr (or raised, with `MORE_HF_DEBUG=1`), 130 if the command was interrupted.

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
        return 2


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
    Parse a command line.

    Args:
        argv (`list[str]`):
            The arguments after the program's name. Flags may have dashes for underscores (`--remap-to`).

    Returns:
        `argparse.Namespace`: the arguments; `run` is the command's function.
    """
    parser = argparse.ArgumentParser(
        "more-hf",
        description="Erase concepts from text-to-image pipelines, and classes from image classifiers.",
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
