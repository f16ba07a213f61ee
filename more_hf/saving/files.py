"""Paths as users give them, errors of the libraries that read and write, and a folder replaced as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # of whichever client it uses

from ..core.errors import ExportError, IncompatibleBaseError, MoreError


# The network and the memory: not something that a file is to blame for.
PASSED_ON = (
    MoreError,
    HTTPError,
    ConnectionError,
    LocalEntryNotFoundError,
    MemoryError,
    torch.OutOfMemoryError,
)


def path_of(argument: str, value: Any) -> Path:
    """A path from what a user gave. Raises `ExportError` if it is none that a file system knows."""
    try:
        path = Path(value)
        path.lstat()  # which raises for a null byte, half of a surrogate pair and names that are too long
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (TypeError, ValueError, OSError) as error:
        raise ExportError(f"`{argument}` must be a path, got {value!r} ({error}).") from error
    return path


@contextmanager
def reading(place: object) -> Iterator[None]:
    """
    Read files that may be damaged or hostile.

    Raises:
        `IncompatibleBaseError`: whatever the libraries that read them raise, apart from `PASSED_ON`.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        raise IncompatibleBaseError(
            f"{place} cannot be read ({type(error).__name__}: {error}). Save or download it again."
        ) from error


@contextmanager
def writing(place: object) -> Iterator[None]:
    """
    Write files, which fails on a full disk or without permission.

    Raises:
        `ExportError`: whatever the libraries that write them raise, apart from `PASSED_ON`.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        raise ExportError(
            f"{place} could not be written ({type(error).__name__}: {error}). Choose another place, or make "
            "room there."
        ) from error


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """
    Put a new folder in the place of `folder`, all of it, or leave everything as it was.

    Files of the old folder that the new one lacks move along. The new folder is written next to the old one,
    and the two change places by renaming: there is the old one or the new one. If the process is killed
    between the two renames, there is none, and the next call for the same folder puts the old one back first.
    Only one process at a time may call it.

    Args:
        folder (`Path`):
            Where to; created if need be.
        write (`Callable`):
            Writes the new folder to the path that it is given.

    Raises:
        `ExportError`: the folder cannot be renamed. And what `write` raises.
    """
    folder = folder.resolve()
    stage = folder.with_name(f".{folder.name}.saving")
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file. Choose a folder.")
    if os.path.ismount(folder) or Path.cwd().is_relative_to(folder):
        raise ExportError(f"{folder} is a mount point or the working directory. Choose a folder inside it.")
    try:
        _settle(folder, stage)
        stage.mkdir(parents=True)
        write(stage / "new")
        if folder.exists():
            folder.rename(stage / "old")
        (stage / "new").rename(folder)
        _settle(folder, stage)
    except BaseException:
        _settle(folder, stage)
        raise


def _settle(folder: Path, stage: Path) -> None:
    """Finish a replacement if the new folder is in its place, undo it otherwise, and clean up."""
    old = stage / "old"
    if old.exists() and folder.exists():
        _move_missing(old, folder)
    elif old.exists():
        old.rename(folder)
    if stage.exists():
        shutil.rmtree(stage)


def _move_missing(source: Path, target: Path) -> None:
    """Move what `target` lacks."""
    for entry in list(source.iterdir()):
        place = target / entry.name
        if not os.path.lexists(place):
            entry.rename(place)
        elif entry.is_dir() and not entry.is_symlink():
            _move_missing(entry, place)
