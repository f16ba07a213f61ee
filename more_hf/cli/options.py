"""Arguments that several commands take, and how to read their values. Imports nothing heavy."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from more_hf.core.request import ROUTERS, SOLVERS
from more_hf.data import EMOJI_ARTISTS


EMOJI_SD = "emoji-sd"
# `accelerate launch --cpu` starts a single process, whatever `--num_processes` says.
SEVERAL_PROCESSES = (
    "Several processes share the work: `accelerate launch --multi_gpu --num_processes N -m more_hf {0} ...`\n"
    "on GPUs, `torchrun --nproc_per_node N -m more_hf {0} ...` on CPUs."
)
DTYPES = ("float32", "float16", "bfloat16")
ONE_FILE = (".safetensors", ".gguf", ".ckpt")  # the suffixes of a model in one file


def add_command(
    commands,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    *,
    purpose: str,
    examples: tuple[str, str],
    details: str = "",
    resumes: bool = False,
) -> argparse.ArgumentParser:
    """
    Add a command to the result of `add_subparsers`, and return its parser, which takes its arguments.

    `run` gets the parsed arguments and returns the exit status; a group of commands has none. The line
    `purpose` is in the list of commands and begins the command's own help, `details` are further lines there,
    and two `examples`, whole command lines, end it. `resumes` says whether running the command again
    continues an interrupted run.
    """
    parser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n{details}".strip(),
        epilog=show_examples(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
        parser.set_defaults(run=run, resumes=resumes)
    return parser


def show_examples(examples: tuple[str, str]) -> str:
    return "\n".join(["examples:", *(f"  {line}" for line in examples)])


def add_model(parser: argparse.ArgumentParser, models: str) -> None:
    """Add the model, with or without a flag; `read_model` reads it."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{models}; before the flags")
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same as a flag")


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add modules of the user's own, which `main` imports."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of yours that defines the pipeline's class or registers its family; repeatable",
    )


def import_module_of_user(name: str) -> None:
    """Import a module that is installed or in the working directory."""
    # A console script, unlike `python -m`, does not look for modules in the working directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"`--import {name}` failed: {error}. Name a module as Python's `import` does, and start the "
            "command in its folder."
        ) from error


def add_concepts(parser: argparse.ArgumentParser, dest: str, help: str, **options: Any) -> None:
    """Add what to forget, as `--concept` or as `--forget`; the help starts with the flag of `dest`."""
    flags = sorted(("--concept", "--forget"), key=lambda flag: flag != f"--{dest}")
    options = {"metavar": "NAME", **options}
    parser.add_argument(*flags, dest=dest, nargs="+", action="extend", help=help, **options)


def add_remap_to(parser: argparse.ArgumentParser, *, note: str = "", **options: Any) -> None:
    parser.add_argument(
        "--remap_to",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"what the concepts are sent to; none erases without remapping{note}",
        **options,
    )


def add_text_encoder(parser: argparse.ArgumentParser) -> None:
    """Add where the text encoder of a checkpoint in one file is."""
    parser.add_argument(
        "--text_encoder",
        metavar="FOLDER_OR_ID",
        help="a diffusers folder or Hub id of the same model, for a MODEL in one file without text encoder",
    )


def add_router(parser: argparse.ArgumentParser) -> None:
    """Add the router and the flag that saves its factors; `save` warns of a router without them."""
    parser.add_argument(
        "--router",
        choices=ROUTERS,
        help="picks an expert for each sample at run time; saved only with --include_delta",
    )
    parser.add_argument(
        "--include_delta",
        action="store_true",
        help="also save the factors of the edit, which a router and the features of a classifier need; "
        "they give what was erased back to whoever has them",
    )


def add_solver(parser: argparse.ArgumentParser, solvers: tuple[str, ...] = SOLVERS, **options: Any) -> None:
    note = "how to solve for the edit; auto picks one and says why (auto)"
    parser.add_argument("--solver", choices=("auto", *solvers), help=note, **options)


def positive(text: str, minimum: int = 1) -> int:
    """A whole number of at least 1, for `type=`."""
    value = int(text)
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
    return value


def read_model(args: argparse.Namespace) -> str:
    given = [model for model in (args.model, args.model_flag) if model is not None]
    if len(given) != 1:
        raise ValueError(f"Name one model, as MODEL or as `--model MODEL`; got {', '.join(given) or 'none'}.")
    refuse_missing_model(given[0])
    return given[0]


def read_remap_to(names: list[str]) -> list[str] | None:
    none = [name for name in names if name.casefold() == "none"]
    if none and len(names) > 1:
        raise ValueError(f"`--remap_to` has {none[0]!r} beside other names. Pass names, or none alone.")
    return None if none else names


def refuse_missing_folder(folder: str | Path, what: str) -> None:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. {what}")


def refuse_missing_model(model: str, what: str = "") -> None:
    """Refuse a path that does not exist; `name` or `owner/name` may also be a Hub id."""
    path = Path(model)
    written_as_path = model.startswith(".") or path.is_absolute() or len(path.parts) > 2
    if (written_as_path or path.suffix in ONE_FILE) and not path.is_file():
        what = what or f"A model is a folder, a file, a Hub id like owner/name, or {EMOJI_SD}."
        refuse_missing_folder(path, what)


def refuse_typo(name: str) -> None:
    """Refuse a name that resembles an artist's. Other names pass, since things can be erased as well."""
    is_artist = name.casefold() in map(str.casefold, EMOJI_ARTISTS)
    if not is_artist and (hint := did_you_mean(name, EMOJI_ARTISTS, cutoff=0.85)):
        raise ValueError(f"The embedded pipeline has no artist {name!r}.{hint}")


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question about the most similar of the known names, for the end of a message; empty if none is."""
    spelling = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), spelling, n=1, cutoff=cutoff)
    return f" Did you mean {spelling[close[0]]!r}?" if close else ""
