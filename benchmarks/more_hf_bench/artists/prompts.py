"""The benchmark's prompts and targets: CSV files, read and checked before anything is generated."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from more_hf.core.errors import shown

from ..errors import BenchmarkError
from .config import ARTISTS, JOINT, Kind


# an installed wheel has the files inside the package, a checkout at its root
FOLDERS = (Path(__file__).parents[1] / "prompts", Path(__file__).parents[3] / "prompts")
REQUIRED = ("case_number", "prompt", "evaluation_seed", "artist")
LONGEST_NUMBER = 18  # digits of a case number or a seed that fit into 64 bits
TOGETHER = 10  # names in all sets of one size together, unless a single set has more
MOST_SPELT = 5  # names that the label of a set lists
IMAGE = "image"  # the level that asks by a picture
SEVERAL = ";"  # separates the names in a cell of a table of targets


@dataclass(frozen=True)
class PromptRow:
    """One prompt and its seed."""

    case_number: int
    prompt: str
    evaluation_seed: int
    artist: str  # the artist that the prompt names; empty if it names none
    thing: str = ""  # the thing that the prompt asks for; empty if the file does not say
    # the group of artists that are compared with each other; the file's name if it does not say
    group: str = ""
    level: str = ""  # the wording: by name, in other words, ...; empty if the file does not say
    image: str = ""  # a picture file that an IP-Adapter reads with the prompt; empty for the prompt alone


@dataclass(frozen=True)
class Prompts:
    """The rows of one prompts file, its name, the sha256 of its bytes, and the kind of concept to forget."""

    name: str
    sha256: str
    rows: tuple[PromptRow, ...]
    kind: Kind = ARTISTS

    def concept(self, row: PromptRow) -> str:
        """The row's artist or thing, whichever is forgotten; empty if the prompt names none."""
        return getattr(row, self.kind.one)

    @property
    def names(self) -> list[str]:
        """Every artist or thing, in the order of the file."""
        return list(dict.fromkeys(filter(None, map(self.concept, self.rows))))

    @property
    def levels(self) -> list[str]:
        """Every level, in the order of the file; `[""]` if it has no levels."""
        return list(dict.fromkeys(row.level for row in self.rows))

    def at(self, levels: Collection[str]) -> Prompts:
        """
        The prompts of some levels.

        Raises:
            BenchmarkError: there are no prompts at one of them.
        """
        for level in levels:
            if level not in filter(None, self.levels):
                known = ", ".join(filter(None, self.levels)) or "none: it has no column `level`"
                raise BenchmarkError(f"{self.name} has no prompts at the level {level!r}. It has {known}.")
        return replace(self, rows=tuple(row for row in self.rows if row.level in levels))

    def group_of(self, name: str) -> list[str]:
        """The other artists or things of the same group."""
        groups = {row.group for row in self.rows if self.concept(row) == name}
        others = [self.concept(row) for row in self.rows if row.group in groups]
        return [other for other in dict.fromkeys(others) if other not in ("", name)]

    def limited(self, limit: int | None) -> tuple[PromptRow, ...]:
        """The first `limit` rows of each artist or thing at each level, and of those without one."""
        if limit is None:
            return self.rows
        seen: Counter[tuple[str, str]] = Counter()
        first = []
        for row in self.rows:
            seen[self.concept(row), row.level] += 1
            if seen[self.concept(row), row.level] <= limit:
                first.append(row)
        return tuple(first)


def spread(prompts: Prompts, names: Collection[str], count: int, seed: str) -> list[PromptRow]:
    """At most `count` rows of some names: each name's first, then each name's second, ..."""
    rows_of: dict[str, list[PromptRow]] = {name: [] for name in names}
    for row in prompts.rows:
        if prompts.concept(row) in rows_of:
            rows_of[prompts.concept(row)].append(row)
    turns = list(rows_of.values())
    random.Random(seed).shuffle(turns)  # so that a small count does not always choose the same names
    rows = [row for turn in zip_longest(*turns) for row in turn if row is not None]
    return rows[:count]


def sets_of(names: Sequence[str], size: int) -> dict[str, list[str]]:
    """
    Cut the first `TOGETHER` names into sets of `size`, at least one set, by their label in `forget`: the
    names themselves if they are few.

    Raises:
        BenchmarkError: there are not enough names to forget `size` and keep one.
    """
    if not 0 < size < len(names):
        raise BenchmarkError(
            f"There are {len(names)} names, of which {size} cannot be forgotten. Choose a size from 1 to "
            f"{len(names) - 1}."
        )
    sets = {}
    for number in range(max(1, min(TOGETHER, len(names)) // size)):
        members = list(names[number * size : (number + 1) * size])
        label = JOINT.join(members) if size <= MOST_SPELT else f"{size} names, set {number + 1}"
        sets[label] = members
    return sets


def read_prompts(source: str | Path, kind: Kind = ARTISTS) -> Prompts:
    """
    Read a CSV file of prompts, or one that ships with the package, by its name (`"emoji10"`).

    The columns are `case_number`, `prompt`, `evaluation_seed`, `artist` and, optionally, `thing`, `group`,
    `level` and `image`, a file relative to this one. Others are ignored, so that published files with an
    unnamed index column can be read unchanged.

    Raises:
        BenchmarkError: a file, column or picture is missing, a prompt is empty, a case number or seed is not
        a whole number of at least 0, or a case number occurs twice. The message names file and line.
    """
    path, content, lines = _read_table(source, REQUIRED)
    rows: list[PromptRow] = []
    line_of: dict[int, int] = {}
    for line, cells in lines:
        case_number = _whole(path, line, "case_number", cells["case_number"])
        if case_number in line_of:
            first = line_of[case_number]
            raise BenchmarkError(
                f"{path}, line {line}: case_number {case_number} is already on line {first}. Give every row "
                "its own."
            )
        if not cells["prompt"]:
            raise BenchmarkError(f"{path}, line {line}: the prompt is empty. Write one or drop the row.")
        line_of[case_number] = line
        rows.append(
            PromptRow(
                case_number=case_number,
                prompt=cells["prompt"],
                evaluation_seed=_whole(path, line, "evaluation_seed", cells["evaluation_seed"]),
                artist=cells["artist"],
                thing=cells.get("thing", ""),
                group=cells.get("group", path.stem if cells["artist"] else ""),
                level=cells.get("level", ""),
                image=_picture(path, line, cells),
            )
        )
    return Prompts(path.stem, hashlib.sha256(content).hexdigest(), tuple(rows), kind)


def read_targets(source: str | Path) -> dict[str, list[str]]:
    """
    Read the targets of each artist from a CSV file, or from one that ships with the package, by its name
    (`"targets"`). The columns are `forget` and `remap_to`: one line per artist, with several targets
    separated by `;`.

    Raises:
        BenchmarkError: a file, column or target is missing, or an artist occurs twice, in upper or lower
        case.
    """
    path, _, lines = _read_table(source, ("forget", "remap_to"))
    targets: dict[str, list[str]] = {}
    for line, cells in lines:
        names = [name.strip() for name in cells["remap_to"].split(SEVERAL) if name.strip()]
        if not cells["forget"] or not names:
            raise BenchmarkError(
                f"{path}, line {line}: needs a name in `forget` and at least one in `remap_to`."
            )
        if cells["forget"].casefold() in {name.casefold() for name in targets}:
            raise BenchmarkError(f"{path}, line {line}: {cells['forget']!r} occurs twice. Join its rows.")
        targets[cells["forget"]] = names
    return targets


def _read_table(
    source: str | Path, required: tuple[str, ...]
) -> tuple[Path, bytes, list[tuple[int, dict[str, str]]]]:
    """The file, its bytes, and each line's number and cells, stripped."""
    path = _find(source)
    content = path.read_bytes()
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        columns = [(column or "").strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        rows = [(reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BenchmarkError(f"{path} is not a CSV file in UTF-8: {error}. Save it as one.") from error
    if missing := [column for column in required if column not in columns]:
        raise BenchmarkError(
            f"{path}, line 1: no column {', '.join(map(repr, missing))}. Name it in the first line, which "
            f"has {', '.join(filter(None, columns))}."
        )
    lines = []
    for line, cells in rows:
        if None in cells or None in cells.values():
            raise BenchmarkError(
                f"{path}, line {line}: the number of cells is not that of the {len(columns)} columns. Put a "
                "cell with a comma into quotes, and leave none out."
            )
        lines.append((line, {column: text.strip() for column, text in cells.items() if column}))
    if not lines:
        raise BenchmarkError(f"{path} has no rows. Write at least one below the names of the columns.")
    return path, content, lines


def _find(source: str | Path) -> Path:
    path = Path(source)
    if os.path.isfile(path):  # `Path.is_file` would raise for a name that no file can have
        return path
    names = set()
    for folder in FOLDERS:
        if os.path.isfile(folder / f"{source}.csv"):
            return folder / f"{source}.csv"
        names |= {candidate.stem for candidate in folder.glob("*.csv")}
    raise BenchmarkError(
        f"There is no file {path}, and no table of that name ships with the package. Name a file or one of "
        f"these: {', '.join(sorted(names))}."
    )


def _picture(path: Path, line: int, cells: dict[str, str]) -> str:
    """A row's picture file; empty if it has none."""
    named = cells.get("image", "")
    if not named and cells.get("level") == IMAGE:
        raise BenchmarkError(f"{path}, line {line}: the level {IMAGE!r} needs a file in the column `image`.")
    if named and not (path.parent / named).is_file():
        raise BenchmarkError(
            f"{path}, line {line}: there is no picture {path.parent / named}. Name it relative to the file."
        )
    return str(path.parent / named) if named else ""


def _whole(path: Path, line: int, column: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > LONGEST_NUMBER:
        raise BenchmarkError(
            f"{path}, line {line}: {column} is {shown(text)}, not a whole number of at least 0."
        )
    return int(text)
