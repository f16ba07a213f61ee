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

from ...core.errors import MoreError, shown
from .config import JOINT
from .kinds import ARTISTS, Kind


# an installed wheel has the files inside the package, a checkout beside it
FOLDERS = (Path(__file__).parents[2] / "prompts", Path(__file__).parents[3] / "prompts")
REQUIRED = ("case_number", "prompt", "evaluation_seed", "artist")
LONGEST_NUMBER = 18  # digits of a case number or a seed: 64 bits
TOGETHER = 10  # names in all sets of one size, if a set has not more of its own
MOST_SPELT = 5  # names in the name of a set
IMAGE = "image"  # the level that asks by a picture
SEVERAL = ";"  # between the names of one cell of a table of targets


class PromptFileError(MoreError, ValueError):
    """The benchmark cannot use a prompts file or a table of targets. The message names file and line."""


@dataclass(frozen=True)
class PromptRow:
    """
    One prompt and its seed.

    Attributes:
        artist (`str`):
            The artist that the prompt names; empty if it names none.
        thing (`str`):
            What it asks for; empty if the file does not say.
        group (`str`):
            The artists that are compared with each other; the file's own name if it does not say.
        level (`str`):
            How it says so: by the name, in other words, ...; empty if the file does not say.
        image (`str`):
            The file of a picture that an IP-Adapter reads with the prompt; empty for the prompt alone.
    """

    case_number: int
    prompt: str
    evaluation_seed: int
    artist: str
    thing: str = ""
    group: str = ""
    level: str = ""
    image: str = ""


@dataclass(frozen=True)
class Prompts:
    """The rows of one prompts file, its name, the sha256 of its bytes, and what is forgotten of it."""

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
        """Every level, in the order of the file; one empty one if it has none."""
        return list(dict.fromkeys(row.level for row in self.rows))

    def at(self, levels: Collection[str]) -> Prompts:
        """
        The prompts of some levels.

        Raises:
            PromptFileError: if there are none of one of them.
        """
        for level in levels:
            if level not in filter(None, self.levels):
                known = ", ".join(filter(None, self.levels)) or "none: it has no column `level`"
                raise PromptFileError(f"{self.name} has no prompts at the level {level!r}. It has {known}.")
        return replace(self, rows=tuple(row for row in self.rows if row.level in levels))

    def group_of(self, name: str) -> list[str]:
        """The others of the artist's or thing's group."""
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
    """`count` rows of some names, or all that there are: each name's first, then each name's second, ..."""
    rows_of: dict[str, list[PromptRow]] = {name: [] for name in names}
    for row in prompts.rows:
        if prompts.concept(row) in rows_of:
            rows_of[prompts.concept(row)].append(row)
    turns = list(rows_of.values())
    random.Random(seed).shuffle(turns)  # so that few rows are not always of the same names
    rows = [row for turn in zip_longest(*turns) for row in turn if row is not None]
    return rows[:count]


def sets_of(names: Sequence[str], size: int) -> dict[str, list[str]]:
    """
    Disjoint sets of `size` names in their order, as many as `TOGETHER` names give but at least one, by what
    an entry of `forget` calls them: the names themselves if they are few.

    Raises:
        PromptFileError: if there are not as many names, and one to keep.
    """
    if not 0 < size < len(names):
        raise PromptFileError(f"There are {len(names)} names, so that {size} cannot be forgotten of them.")
    sets = {}
    for number in range(max(1, min(TOGETHER, len(names)) // size)):
        chosen = list(names[number * size : (number + 1) * size])
        label = JOINT.join(chosen) if size <= MOST_SPELT else f"{size} names, set {number + 1}"
        sets[label] = chosen
    return sets


def read_prompts(source: str | Path, kind: Kind = ARTISTS) -> Prompts:
    """
    Read a prompts file.

    Columns are `case_number`, `prompt`, `evaluation_seed`, `artist` and, optionally, `thing`, `group`,
    `level` and `image`, a file named from the folder of this one.
    Others are ignored, so that published files with an unnamed index column can be read as they are.

    Args:
        source (`str` or `Path`):
            The path of a CSV file, or the name of one that ships with the package (`"emoji10"`).
        kind (`Kind`, *optional*, defaults to `ARTISTS`):
            What is forgotten.

    Returns:
        `Prompts`: the rows.

    Raises:
        PromptFileError: naming the file and the line, for a missing file, column or picture, an empty prompt,
            a case number or seed that is not a whole number of at least 0, and a case number that occurs
            twice.
    """
    path, content, lines = _read_table(source, REQUIRED)
    rows: list[PromptRow] = []
    line_of: dict[int, int] = {}
    for line, cells in lines:
        case_number = _whole(path, line, "case_number", cells["case_number"])
        if case_number in line_of:
            first = line_of[case_number]
            raise PromptFileError(
                f"{path}, line {line}: case_number {case_number} is already on line {first}. Give every row "
                "its own."
            )
        if not cells["prompt"]:
            raise PromptFileError(f"{path}, line {line}: the prompt is empty. Write one or drop the row.")
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
    Read a table of targets: columns `forget` and `remap_to`, one line per artist, several targets joined by
    `;`.

    Args:
        source (`str` or `Path`):
            The path of a CSV file, or the name of one that ships with the package (`"targets"`).

    Returns:
        `dict[str, list[str]]`: artist to targets.

    Raises:
        PromptFileError: for a missing file, column or target, and for an artist that occurs twice, whatever
            the case.
    """
    path, _, lines = _read_table(source, ("forget", "remap_to"))
    targets: dict[str, list[str]] = {}
    for line, cells in lines:
        names = [name.strip() for name in cells["remap_to"].split(SEVERAL) if name.strip()]
        if not cells["forget"] or not names:
            raise PromptFileError(
                f"{path}, line {line}: needs a name in `forget` and at least one in `remap_to`."
            )
        if cells["forget"].casefold() in {name.casefold() for name in targets}:
            raise PromptFileError(f"{path}, line {line}: {cells['forget']!r} occurs twice. Join its rows.")
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
        raise PromptFileError(
            f"{path} is not a CSV file in UTF-8: {error}. Write it again as one."
        ) from error
    if missing := [column for column in required if column not in columns]:
        raise PromptFileError(
            f"{path}, line 1: no column {', '.join(map(repr, missing))}. Name it in the first line, beside "
            f"what is there: {', '.join(filter(None, columns))}."
        )
    lines = []
    for line, cells in rows:
        if None in cells or None in cells.values():
            raise PromptFileError(
                f"{path}, line {line}: not as many cells as the {len(columns)} columns. Put a cell with a "
                "comma into quotes, and leave none out."
            )
        lines.append((line, {column: text.strip() for column, text in cells.items() if column}))
    if not lines:
        raise PromptFileError(f"{path} has no rows. Write at least one below the names of the columns.")
    return path, content, lines


def _find(source: str | Path) -> Path:
    path = Path(source)
    if os.path.isfile(path):  # which says no, too, of a name that is none
        return path
    names = set()
    for folder in FOLDERS:
        if os.path.isfile(folder / f"{source}.csv"):
            return folder / f"{source}.csv"
        names |= {candidate.stem for candidate in folder.glob("*.csv")}
    raise PromptFileError(
        f"There is no file {path}, and no table of that name ships with the package. Name a file or one of "
        f"these: {', '.join(sorted(names))}."
    )


def _picture(path: Path, line: int, cells: dict[str, str]) -> str:
    """The file of a row's picture; empty if it has none."""
    named = cells.get("image", "")
    if not named and cells.get("level") == IMAGE:
        raise PromptFileError(f"{path}, line {line}: the level {IMAGE!r} needs a file in the column `image`.")
    if named and not (path.parent / named).is_file():
        raise PromptFileError(
            f"{path}, line {line}: there is no picture {path.parent / named}. Name it relative to the file."
        )
    return str(path.parent / named) if named else ""


def _whole(path: Path, line: int, column: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > LONGEST_NUMBER:
        raise PromptFileError(
            f"{path}, line {line}: {column} is {shown(text)}, not a whole number of at least 0."
        )
    return int(text)
