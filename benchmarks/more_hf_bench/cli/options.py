"""Arguments that several benchmarks take, and how to read their values. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import logging
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from more_hf.cli.checkpoint import add_device
from more_hf.cli.options import did_you_mean, positive
from more_hf.data import EMOJI_ARTISTS


if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.getLogger(__name__)

Options = TypeVar("Options")

PRESETS = Path(__file__).parents[1] / "presets"
NAMES = {"nargs": "+", "action": "extend", "metavar": "NAME"}  # of a flag with one or several names


def natural(text: str) -> int:
    """A whole number of at least 0, for `type=`."""
    return positive(text, minimum=0)


def refuse_unknown(names: Iterable[str], known: Iterable[str], *, what: str, also: str = "") -> None:
    """Refuse the first of `names` that is not `known`, and suggest a similar known name."""
    known = list(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"There is no {what} {name!r}.{hint} Available: {', '.join(known)}{also}.")


def emoji_artist(name: str) -> str:
    """The embedded pipeline's spelling of an artist's name."""
    for artist in EMOJI_ARTISTS:
        if artist.casefold() == name.casefold():
            return artist
    hint, available = did_you_mean(name, EMOJI_ARTISTS), ", ".join(EMOJI_ARTISTS)
    raise ValueError(f"The embedded pipeline has no artist {name!r}.{hint} Available: {available}.")


def key(default: Any, help: str) -> Any:
    """An option that a file of `--config` may have, as a field of a dataclass."""
    return field(default=default, metadata={"help": help})


def flag(default: Any, help: str, also: str = "", **argument: Any) -> Any:
    """An option that is a flag, too, with what `add_argument` takes; `also` is another name of the flag."""
    return field(default=default, metadata={"help": help, "flag": {"help": help, **argument}, "also": also})


def presets(benchmark: str) -> dict[str, Path]:
    """The packaged files of options of a benchmark, by name: one for each table of the paper."""
    return {path.stem: path for path in sorted((PRESETS / benchmark).glob("*.toml"))}


def add_options(parser: argparse.ArgumentParser, kind: type, benchmark: str | None = None) -> None:
    """
    Add the flags of a dataclass of options, and of its file; the other options close the description. A
    `benchmark` with presets gets their flags, too.
    """
    add = parser.add_argument
    if benchmark is not None:
        named = ", ".join(presets(benchmark))
        add("--preset", metavar="NAME", help=f"in place of --config: a table of the paper, of {named}")
        add("--rehearse", action="store_true", help="run on small stand-ins, to see that all of it works")
    parser.set_defaults(benchmark=benchmark)
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML or JSON file of options, or the config.json of a folder, to run that again; flags take "
        "precedence",
    )
    parser.description += "\n\nfurther options in the file of --config:"
    for option in fields(kind):
        facts = option.metadata
        if "flag" in facts:
            add(*filter(None, [f"--{option.name}", facts["also"]]), **facts["flag"])
        else:
            parser.description += f"\n  {option.name}: {facts['help']}"
    add_device(parser, "accelerate's choice")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for rows, tables and pictures")


def read_options(
    kind: type[Options], args: argparse.Namespace, of_folder: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> Options:
    """
    Collect a benchmark's options, a dataclass whose annotations, which are plain classes, are checked: a
    flag's value, else that of `--config`, else the default. `of_folder` makes options of the `config.json` of
    a benchmark's folder.

    Raises:
        ValueError: the file is no TOML or JSON, has an unknown option, or one of another type.
    """
    names = [field.name for field in fields(kind)]
    if getattr(args, "preset", None) is not None:
        if args.config is not None:
            raise ValueError("`--preset` and `--config` each name a file of options. Give one of them.")
        known = presets(args.benchmark)
        refuse_unknown([args.preset], known, what="preset")
        args.config = known[args.preset]
    held = {} if args.config is None else dict(_read_file(args.config))
    if "runs" in held:
        held = dict(of_folder(held))
    refuse_unknown(held, names, what="option", also=f"; found in {args.config}")
    if isinstance(held.get("tuned"), str):
        held["tuned"] = _read_file(args.config.parent / held["tuned"])
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    options = kind(**{**held, **given})
    for name, allowed in get_type_hints(kind).items():
        if not isinstance(getattr(options, name), allowed):
            raise ValueError(
                f"`{name}` must be {str(allowed).replace('NoneType', 'left out')} in {args.config}, "
                f"got {getattr(options, name)!r}."
            )
    return options


def _read_file(path: Path) -> dict[str, Any]:
    """Read a TOML or JSON file. Both readers' errors are `ValueError`s, without the file's name."""
    try:
        return (tomllib if path.suffix == ".toml" else json).loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def split_names(
    names: str | list[str], groups: Mapping[str, list[str]], known: Iterable[str], *, what: str
) -> list[str]:
    """The names in a word like `A,B`, in a list, or in the group of that name; refuses an unknown one."""
    if isinstance(names, str):
        names = groups.get(names) or names.split(",")
    # One's own is MODULE:FUNCTION.
    registered = [name.removesuffix("-reloaded") for name in names if ":" not in name]
    also = f"; or one of {', '.join(groups)}" if groups else ""
    refuse_unknown(registered, known, what=what, also=also)
    return list(names)


def start_processes(device: str | None) -> PartialState:
    """accelerate's state of this process, on the device that `--device` names; says what it runs in."""
    from more_hf.cli.checkpoint import find_device

    from ..machine import describe, processes

    state = processes(None if device is None else find_device(device, "none"))
    logger.info("%s", describe(state))
    return state
