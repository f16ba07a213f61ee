"""The file of `--concepts_file`: a plain list with a concept on each line, or TOML, which can say more."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from more_hf.core.request import REACHES


# A plain name starts with a letter or digit and has nothing that another format would give a meaning to, such
# as bullets, quotes, commas, equals signs, colons and arrows. TOML can hold every name.
PLAIN_NAME = re.compile(r"(?!\d+[.)] )(?!.* -+ )\w[^,;:=<>|\"#\t→]*")
OWN_KEYS = ("remap_to", "aliases", "reach")
SHARED_KEYS = ("concepts", "remap_to", "retain")


@dataclass(frozen=True)
class Listed:
    """What a list says about one concept."""

    targets: tuple[str, ...] = ()  # its own targets; empty if it has none
    aliases: tuple[str, ...] = ()  # its other names
    reach: str | None = None  # its own reach


@dataclass(frozen=True)
class ConceptList:
    """A list of concepts."""

    # what the list says about each concept, by name
    concepts: dict[str, Listed] = field(default_factory=dict)
    remap_to: tuple[str, ...] = ()  # targets of the concepts that have none of their own
    retain: tuple[str, ...] = ()  # names to protect


def read_concepts(file: Path) -> ConceptList:
    """
    Read a list: TOML if the file's name ends in `.toml`, and else a plain one.

    Raises:
        ValueError: something in it cannot be read, or could be meant in another way.
    """
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}. Write it again as UTF-8.") from error
    if file.suffix.lower() != ".toml":
        return _read_plain(file, text)
    try:
        return _read_table(tomllib.loads(text))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_plain(file: Path, text: str) -> ConceptList:
    concepts: dict[str, Listed] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, arrow, targets = (part.strip() for part in line.partition("->"))
        own = [target.strip() for target in targets.split(",")] if arrow else []
        if not all(map(PLAIN_NAME.fullmatch, [name, *own])):
            raise ValueError(
                f'{file}, line {number}: {line.strip()!r} is neither "NAME" nor "NAME -> TARGET, TARGET". A '
                "list in TOML (FILE.toml) can hold aliases, and names with signs in them."
            )
        if name in concepts:
            raise ValueError(f"{file}, line {number}: {name!r} is listed twice. Name it once.")
        concepts[name] = Listed(tuple(own))
    return ConceptList(concepts)


def _read_table(data: Mapping[str, Any]) -> ConceptList:
    _refuse_other_keys("the list", data, SHARED_KEYS)
    concepts = data.get("concepts", {})
    if not isinstance(concepts, Mapping):
        raise ValueError(
            f"`concepts` must be a table, as [concepts] with lines NAME = TARGET, got {concepts!r}."
        )
    return ConceptList(
        {name: _read_own(name, value) for name, value in concepts.items()},
        _read_words("remap_to", data.get("remap_to", [])),
        _read_words("retain", data.get("retain", [])),
    )


def _read_own(name: str, value: Any) -> Listed:
    """One concept's own: its targets, or a table."""
    if not isinstance(value, Mapping):
        value = {"remap_to": value}
    _refuse_other_keys(repr(name), value, OWN_KEYS)
    reach = value.get("reach")
    if reach not in (None, *REACHES):
        raise ValueError(f"`reach` of {name!r} must be one of {', '.join(REACHES)}, got {reach!r}.")
    targets = _read_words(f"remap_to` of `{name}", value.get("remap_to", []))
    return Listed(targets, _read_words(f"aliases` of `{name}", value.get("aliases", [])), reach)


def _read_words(key: str, value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"`{key}` must be a name or a list of names, got {value!r}.")
    return tuple(words)


def _refuse_other_keys(what: str, data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if other := [key for key in data if key not in known]:
        raise ValueError(f"{what} has {other[0]!r}; it takes {', '.join(known)}.")
