"""The files of a saved folder: those that the record lists because `save` wrote them, and all others."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.record import RECORD, Record
from ..data import FOLDER
from .files import reading


MODEL_INDEX = "model_index.json"
DELTA = "more_hf_delta.safetensors"
CARD = "README.md"

# Whatever has one of these in its name could be loaded as weights: `x.bin`, `x.bin.index.json`, `x.pth.tar`.
LOADABLE = frozenset(
    (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf")
)
# The names that `save_pretrained` gives to weights and to the index of their shards.
WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(?P<variant>\.[\w-]+?)?(-\d{5}-of-\d{5})?\.safetensors")
INDEX = re.compile(r"(diffusion_pytorch_)?model\.safetensors\.index(?P<variant>\.[\w-]+)?\.json")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
HIDDEN = (".git", ".cache")  # folders of git and of the Hub's client


@dataclass(frozen=True)
class Contents:
    """The files of a folder, sorted by purpose; all paths are relative to it."""

    saved: list[Path]  # the record, and the files that it lists
    aside: list[Path]  # the user's own files, such as a model card and pictures
    # what could be loaded as weights although `save` did not write it, and links to folders
    foreign: list[Path]


def survey(folder: Path, record: Record) -> Contents:
    """Sort a folder's files."""
    contents = Contents([], [], [])
    for path in entries(folder):
        listed = path.as_posix() in record.files and _is_written_by_save(path)
        if listed or path == Path(RECORD):
            contents.saved.append(path)
        elif is_foreign(folder, path):
            contents.foreign.append(path)
        else:
            contents.aside.append(path)
    return contents


def entries(folder: Path) -> Iterator[Path]:
    """Yield every file, and each linked or hidden folder as one entry, relative to `folder`, in order."""
    for place, folders, files in os.walk(folder):
        whole = [name for name in folders if name in HIDDEN or Path(place, name).is_symlink()]
        folders[:] = sorted(set(folders).difference(whole))
        for name in sorted(files + whole):
            yield Path(place, name).relative_to(folder)


def is_foreign(folder: Path, path: Path) -> bool:
    """Whether an entry that `save` did not write must not be in its folder."""
    link = (folder / path).is_dir() and path.name not in HIDDEN
    return link or is_loadable(path)


def is_loadable(path: Path) -> bool:
    """Whether some loader could read weights from a file of this name."""
    return not LOADABLE.isdisjoint(suffix.lower() for suffix in path.suffixes)


def hashes(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Path -> the sha256 of the file's content, for `Record.files`."""
    found = {}
    for path in paths:
        with (folder / path).open("rb") as file:
            found[path.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def folder_of_base(base: str) -> Path:
    """Where an original is that a record names: a folder, the embedded pipeline's, or a name on the Hub."""
    return FOLDER / "emoji_sd" if base == "emoji-sd" else Path(base)


def sources_of(base: str) -> dict[str, str]:
    """The sha256 of the files of an original's components, if it was opened from a folder."""
    folder = folder_of_base(base)
    if not base or not (folder / MODEL_INDEX).is_file():
        return {}
    with reading(folder):
        index = json.loads((folder / MODEL_INDEX).read_text("utf-8"))
        return hashes(folder, [path for path in entries(folder) if path.parts[0] in (MODEL_INDEX, *index)])


def changed_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The files of `Record.files` that are missing or changed; only the factors may have been taken away."""
    with reading(folder):
        found = hashes(folder, [Path(name) for name in files if (folder / name).is_file()])
    changed = [name for name, digest in files.items() if found.get(name) != digest]
    return [name for name in changed if name != DELTA or name in found]


def variant_of(name: str) -> str | None:
    """The variant in the name of weights or their index: "fp16", "" without one, `None` for other names."""
    match = WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)
    return match and (match["variant"] or "").removeprefix(".")


def weight_files(record: Record, component: str) -> list[Path]:
    """A component's weight files, as the record lists them."""
    paths = [Path(name) for name in record.files]
    return [path for path in paths if str(path.parent) == component and WEIGHTS.fullmatch(path.name)]


def _is_written_by_save(path: Path) -> bool:
    """Whether `save` writes files of this name, whatever a record lists: no weights but safetensors."""
    return path == Path(DELTA) or variant_of(path.name) is not None or not is_loadable(path)
