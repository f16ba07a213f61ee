"""The benchmark's prompts: a CSV file in the field's schema, read and checked before anything is generated."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import MoreError


# an installed wheel has the files inside the package, a checkout beside it
FOLDERS = (Path(__file__).parents[2] / "prompts", Path(__file__).parents[3] / "prompts")
REQUIRED = ("case_number", "prompt", "evaluation_seed", "artist")
SEVERAL = ";"  # between the names of one cell of a table of targets


class PromptFileError(MoreError, ValueError):
    """A prompts file, or a table of targets, is not what the benchmark can use. The message names file and line."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt and its seed.

    Attributes:
        artist (`str`): the artist that the prompt names; empty if it names none.
        thing (`str`): what it asks for; empty if the file does not say.
        group (`str`): the artists that are compared with each other; the file's own name if it does not say.
    """

    case_number: int
    prompt: str
    evaluation_seed: int
    artist: str
    thing: str = ""
    group: str = ""


@dataclass(frozen=True)
class Prompts:
    """The rows of one prompts file, its name and the sha256 of its bytes."""

    name: str
    sha256: str
    rows: tuple[PromptRow, ...]

    @property
    def artists(self) -> list[str]:
        """Every artist, in the order of the file."""
        return list(dict.fromkeys(row.artist for row in self.rows if row.artist))

    def group_of(self, artist: str) -> list[str]:
        """The other artists of the artist's group."""
        groups = {row.group for row in self.rows if row.artist == artist}
        return list(dict.fromkeys(row.artist for row in self.rows if row.group in groups and row.artist not in ("", artist)))

    def limited(self, limit: int | None) -> tuple[PromptRow, ...]:
        """The first `limit` rows of each artist, and of those without one."""
        seen: dict[str, int] = {}
        kept = []
        for row in self.rows:
            seen[row.artist] = seen.get(row.artist, 0) + 1
            if limit is None or seen[row.artist] <= limit:
                kept.append(row)
        return tuple(kept)


def read_prompts(source: str | Path) -> Prompts:
    """Read a prompts file: the path of a CSV file, or the name of one that ships with the package (`"emoji10"`).

    Columns are `case_number, prompt, evaluation_seed, artist` and, where there are, `thing` and `group`. Others are ignored, so that
    the field's own files, with their unnamed index column, can be read as they are.

    Raises `PromptFileError`, naming the file and the line, for a missing file or column, an empty prompt, a case number or seed that
    is not a whole number of at least 0, and a case number that is there twice.
    """
    path, content, lines = _read_table(source, REQUIRED)
    rows: list[PromptRow] = []
    line_of: dict[int, int] = {}
    for line, cells in lines:
        case_number = _whole(path, line, "case_number", cells["case_number"])
        if case_number in line_of:
            raise PromptFileError(f"{path}, line {line}: case_number {case_number} is already on line {line_of[case_number]}.")
        if not cells["prompt"]:
            raise PromptFileError(f"{path}, line {line}: the prompt is empty.")
        line_of[case_number] = line
        rows.append(
            PromptRow(
                case_number=case_number,
                prompt=cells["prompt"],
                evaluation_seed=_whole(path, line, "evaluation_seed", cells["evaluation_seed"]),
                artist=cells["artist"],
                thing=cells.get("thing", ""),
                group=cells.get("group", path.stem if cells["artist"] else ""),
            )
        )
    return Prompts(path.stem, hashlib.sha256(content).hexdigest(), tuple(rows))


def read_targets(source: str | Path) -> dict[str, list[str]]:
    """Read a table of targets: columns `forget` and `remap_to`, one line per artist, several targets joined by `;`.

    Raises `PromptFileError` for a missing file, column or target, and for an artist that is there twice.
    """
    path, _, lines = _read_table(source, ("forget", "remap_to"))
    targets: dict[str, list[str]] = {}
    for line, cells in lines:
        names = [name.strip() for name in cells["remap_to"].split(SEVERAL) if name.strip()]
        if not cells["forget"] or not names:
            raise PromptFileError(f"{path}, line {line}: needs a name in `forget` and at least one in `remap_to`.")
        if cells["forget"] in targets:
            raise PromptFileError(f"{path}, line {line}: {cells['forget']!r} is there twice.")
        targets[cells["forget"]] = names
    return targets


def _read_table(source: str | Path, required: tuple[str, ...]) -> tuple[Path, bytes, list[tuple[int, dict[str, str]]]]:
    """The file, its bytes, and each line's number and cells, stripped."""
    path = _find(source)
    content = path.read_bytes()
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    columns = [(column or "").strip() for column in reader.fieldnames or ()]
    reader.fieldnames = columns
    if missing := [column for column in required if column not in columns]:
        raise PromptFileError(f"{path}, line 1: no column {', '.join(map(repr, missing))}. There are: {', '.join(filter(None, columns))}.")
    lines = []
    for cells in reader:
        if None in cells or None in cells.values():
            raise PromptFileError(f"{path}, line {reader.line_num}: not as many cells as the {len(columns)} columns.")
        lines.append((reader.line_num, {column: text.strip() for column, text in cells.items() if column}))
    if not lines:
        raise PromptFileError(f"{path} has no rows.")
    return path, content, lines


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    packaged = [folder / f"{source}.csv" for folder in FOLDERS]
    if found := [candidate for candidate in packaged if candidate.is_file()]:
        return found[0]
    names = sorted({candidate.stem for folder in FOLDERS for candidate in folder.glob("*.csv")})
    raise PromptFileError(f"There is no file {path}, and no table of that name ships with the package. Those are: {', '.join(names)}.")


def _whole(path: Path, line: int, column: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise PromptFileError(f"{path}, line {line}: {column} is {text!r}, not a whole number of at least 0.")
    return int(text)
