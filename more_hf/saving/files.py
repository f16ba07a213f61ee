"""Translate the errors of libraries that read and write, and replace a folder as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # whichever HTTP client it uses

from ..core.errors import ExportError, IncompatibleBaseError, MoreError


# Errors of the network and the memory, for which no file is to blame.
PASSED_ON = (
    MoreError, HTTPError, ConnectionError, LocalEntryNotFoundError, MemoryError, torch.OutOfMemoryError,
)  # fmt: skip

PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # the suffixes of files that can carry code


def reading(place: object) -> AbstractContextManager[None]:
    """
    Inside the block, read files that may be damaged or hostile.

    Raises:
        `IncompatibleBaseError`: in place of any error of the libraries that read them, except `PASSED_ON`.
    """
    return _raised_as(IncompatibleBaseError, f"{place} cannot be read", "Save or download it again.")


def writing(place: object) -> AbstractContextManager[None]:
    """
    Inside the block, write files, which may fail on a full disk or without permission.

    Raises:
        `ExportError`: in place of any error of the libraries that write them, except `PASSED_ON`.
    """
    return _raised_as(ExportError, f"{place} could not be written", "Choose another place, or make room.")


@contextmanager
def _raised_as(kind: type[MoreError], fact: str, next_step: str) -> Iterator[None]:
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        raise kind(f"{fact} ({type(error).__name__}: {error}). {next_step}") from error


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """
    Replace `folder`, which is created if needed, as a whole by what `write` writes to the path that it gets,
    or leave everything as it was.

    Files of the old folder that the new one lacks are moved into it. The new folder is written next to the
    old one, and two renames swap them, so a reader sees the old one or the new one. If the process is killed
    between the two renames, neither is there, and the next call for the same folder first puts the old one
    back. Only one process at a time may call this.

    Raises:
        `ExportError`: the folder cannot be renamed. Also whatever `write` raises.
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
    """Finish a replacement if the new folder is in place, otherwise undo it; then clean up."""
    old = stage / "old"
    if old.exists() and folder.exists():
        _move_missing(old, folder)
    elif old.exists():
        old.rename(folder)
    if stage.exists():
        shutil.rmtree(stage)


def _move_missing(source: Path, target: Path) -> None:
    """Move everything that `target` lacks from `source`."""
    for entry in list(source.iterdir()):
        place = target / entry.name
        if not os.path.lexists(place):
            entry.rename(place)
        elif entry.is_dir() and not entry.is_symlink():
            _move_missing(entry, place)
