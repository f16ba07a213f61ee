"""The files that a folder of `save` may hold, by component and class; anything else is foreign."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import IncompatibleBaseError
from ..core.record import RECORD, Record
from .files import reading


MODEL_INDEX = "model_index.json"
DELTA = "more_hf_delta.safetensors"
CARD = "README.md"

# The files that diffusers and transformers write for a component besides weights.
CONFIGS = frozenset(
    (
        "config.json",
        "generation_config.json",
        "scheduler_config.json",
        "guider_config.json",
        # processors
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        # tokenizers
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "spiece.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
    )
)
NAME = re.compile(r"[A-Za-z]\w*")  # a component's name, which is also its folder's
# The class names of components without weights match this.
WEIGHTLESS = re.compile(r"Tokenizer|Processor|FeatureExtractor|Scheduler$|Guidance$")

# Files that people keep next to a model, and that no loader reads.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
TEXTS = (".md", ".txt")
NAMES = ("LICENSE", "LICENCE", "NOTICE")
HIDDEN = (".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store")


@dataclass(frozen=True)
class Contents:
    """
    The files of a folder, sorted by purpose; all paths are relative to it.

    Args:
        weights (`dict[str, list[Path]]`):
            For each component with weights, the files that `from_pretrained` reads.
        parts (`list[Path]`):
            Everything else that `save` writes.
        aside (`list[Path]`):
            The user's texts, pictures, git files and spare configurations.
        foreign (`list[Path]`):
            Everything else, such as other weights and links to folders.
    """

    weights: dict[str, list[Path]]
    parts: list[Path]
    aside: list[Path]
    foreign: list[Path]

    @property
    def saved(self) -> list[Path]:
        """Everything that `save` writes."""
        return self.parts + [path for paths in self.weights.values() for path in paths]


def survey(folder: Path, record: Record) -> Contents:
    """
    Sort a folder's files.

    Raises:
        `IncompatibleBaseError`: the folder's index cannot be read, or does not name the record's component.
    """
    with reading(folder):
        classes = _component_classes(folder, record)
    parts = {Path(name) for name in (RECORD, DELTA, MODEL_INDEX)}
    parts |= {Path(component, config) for component in classes for config in CONFIGS}
    weights = {}
    for component, (library, cls) in classes.items():
        if not WEIGHTLESS.search(cls):
            stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
            with reading(folder / component):
                weights[component], index = _weight_files(folder, component, stem, record.variant)
            parts |= index
    known = {path for paths in weights.values() for path in paths}
    contents = Contents(weights, [], [], [])
    for path in entries(folder):
        if path in known:
            continue
        if path in parts:
            contents.parts.append(path)
        elif is_aside(folder, path):
            contents.aside.append(path)
        else:
            contents.foreign.append(path)
    return contents


def entries(folder: Path) -> Iterator[Path]:
    """
    Yield every file, and each linked or hidden folder as a single entry, relative to `folder`, in order.
    """
    for place, folders, files in os.walk(folder):
        whole = [name for name in folders if name in HIDDEN or Path(place, name).is_symlink()]
        folders[:] = sorted(set(folders).difference(whole))
        for name in sorted(files + whole):
            yield Path(place, name).relative_to(folder)


def is_aside(folder: Path, path: Path) -> bool:
    """Whether an entry that is not part of the model may be next to it."""
    return may_stay(path) and ((folder / path).is_file() or path.name in HIDDEN)


def may_stay(path: Path) -> bool:
    """
    Whether a name belongs to a text, a picture, a configuration or git, from which no loader reads weights.
    """
    names = (*CONFIGS, *NAMES, *HIDDEN)
    return path.name in names or path.suffix.lower() in (*PICTURES, *TEXTS)


def _component_classes(folder: Path, record: Record) -> dict[str, tuple[str, str]]:
    """Component -> its library and class."""
    if record.kind == "classifier":
        return {record.denoiser: ("transformers", "PreTrainedModel")}
    index = json.loads((folder / MODEL_INDEX).read_text("utf-8"))
    pairs = {name: value for name, value in index.items() if isinstance(value, list)}
    classes = {
        name: (library, cls) for name, (library, cls) in pairs.items() if library and NAME.fullmatch(name)
    }
    if not classes.keys() >= record.prefixes.keys():
        raise IncompatibleBaseError(
            f"The record in {folder} describes `{record.denoiser}`, which {MODEL_INDEX} does not name. "
            "Save the erased model again."
        )
    return classes


def _weight_files(
    folder: Path, component: str, stem: str, variant: str | None
) -> tuple[list[Path], set[Path]]:
    """
    The weight files of a component, and the index of its shards if it has one.

    If there are both a single file and shards, the library decides which of them is read, so neither counts.
    """
    suffix = f".{variant}" if variant else ""
    single = Path(component, f"{stem}{suffix}.safetensors")
    index = Path(component, f"{stem}.safetensors.index{suffix}.json")
    if (folder / single).is_file() == (folder / index).is_file():
        return [], set()
    if (folder / single).is_file():
        return [single], set()
    shard = re.compile(rf"{re.escape(stem + suffix)}-\d{{5}}-of-\d{{5}}\.safetensors")
    named = set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values())
    files = [Path(component, name) for name in sorted(named) if shard.fullmatch(name)]
    return [path for path in files if (folder / path).is_file()], {index}
