"""The record of an erasure, `more_hf.json` beside the saved weights; only this module reads and writes it."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import AlreadyErasedError, IncompatibleBaseError, MoreError
from .facts import ClassFacts, ConceptFacts, is_text
from .request import ClassRequest, ConceptRequest
from .site import Site, fingerprint


logger = logging.getLogger(__name__)

RECORD = "more_hf.json"
MEASURED = {"images", "before", "after"}  # of each class in `ClassFacts.accuracy`
CLASSIFIER = "."  # the folder of a classifier's weights; a pipeline's denoiser has a folder of its own
TOGETHER = "+"  # joins the names of denoisers that were edited as one
VARIANT = re.compile(r"[A-Za-z0-9_-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
FILE = re.compile(r"[^./\\:\0][^/\\:\0]*(/[^./\\:\0][^/\\:\0]*)*")  # a path inside the folder


@dataclass(frozen=True, kw_only=True)
class Record:
    """
    The content of `more_hf.json`, with all that it takes to erase again and compare: `verify(rerun=True)`.
    Every field is needed; those of newer versions give a warning.
    """

    more_hf: str  # the version that wrote the record
    versions: dict[str, str]  # of Python, torch, diffusers and transformers
    request: ConceptRequest | ClassRequest  # what was asked for
    sites: dict[str, list[int]]  # the shape of each edited weight
    guarantees: dict[str, float]  # the measurements of `Remap.verify`
    proof: dict[str, float]  # the measurements of the proof by run
    facts: ConceptFacts | ClassFacts  # what else was measured or decided
    # The folder of the edited component; `"."` for a classifier. Two denoisers that were edited as one are
    # joined by `+`, and the layer names in `sites` then start with the component's name.
    denoiser: str
    variant: str | None  # the variant of the weight files, as passed to `save_pretrained`
    layout: str  # sha256 of the names and shapes of the component's tensors, which are the same as the base's
    edited: str  # fingerprint of the edited weights as saved
    # the sha256 of the original's files, if it was a folder; on the Hub, `base_revision` stands for them
    sources: dict[str, str]
    files: dict[str, str]  # the sha256 of every file that `save` wrote next to the record

    @property
    def kind(self) -> Literal["pipeline", "classifier"]:
        """What kind of model was erased."""
        return "classifier" if self.denoiser == CLASSIFIER else "pipeline"

    @property
    def prefixes(self) -> dict[str, str]:
        """See `prefixes_of`."""
        return prefixes_of(self.denoiser)

    def to_json(self) -> str:
        """The content of the file."""
        whole = {**asdict(self), "request": self.request.to_dict()}
        return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Record:
        """
        Read a folder's record.

        Raises:
            `MoreError`: the folder has no record. `IncompatibleBaseError`: the record is malformed: a key is
            missing, a value has the wrong type or is out of range, or a path leads out of the folder.
        """
        path = folder / RECORD
        if not path.is_file():
            raise MoreError(
                f"{folder} has no {RECORD}: it was not written by `more_hf.save`, so nothing says what was "
                "erased. Save the erased model again."
            )
        try:
            # an editor may have put a byte order mark in front
            return cls._from_dict(json.loads(path.read_text("utf-8-sig")), path)
        except (ValueError, TypeError, OSError, ArithmeticError, RecursionError) as error:
            raise IncompatibleBaseError(
                f"{path} is not a record: {error}. Save the erased model again."
            ) from error

    @classmethod
    def _from_dict(cls, data: Any, path: Path) -> Record:
        if not isinstance(data, dict):
            raise TypeError(f"it holds a {type(data).__name__}")
        classifier = data.get("denoiser") == CLASSIFIER
        request = ClassRequest if classifier else ConceptRequest
        facts = ClassFacts if classifier else ConceptFacts
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        if missing := [field.name for field in fields(cls) if field.name not in data]:
            raise ValueError(f"it lacks {', '.join(map(repr, missing))}")
        if newer := [key for key in data if key not in known]:
            logger.warning("%s has keys that this version ignores: %s", path, ", ".join(newer))
        hints = get_type_hints(cls)
        check_type("request", data["request"], dict[str, Any])
        parsed = {"request": request.from_dict(data["request"]), "facts": read_fields(facts, data["facts"])}
        # request and facts were checked by their own classes
        for name in known:
            if name not in parsed:
                check_type(name, known[name], hints[name])
        record = cls(**{**known, **parsed})
        record._check()
        return record

    def _check(self) -> None:
        """
        Raises `ValueError` for a value that no erasure writes and nothing else refuses: a path out of the
        folder, or one that hides what was edited. Hashes and shapes are compared with the files.
        """
        if self.kind == "pipeline":
            self._check_pipeline()
        elif set(self.request.head) != set(self.sites):
            raise ValueError(f"`head` is {list(self.request.head)}, but `sites` are {list(self.sites)}")
        elif any(one.keys() != MEASURED for one in self.facts.accuracy.values()):
            raise ValueError(f"`accuracy` needs {', '.join(sorted(MEASURED))} of each class")
        if self.variant is not None and not VARIANT.fullmatch(self.variant):
            raise ValueError(f"`variant` is {self.variant!r}, which is no part of a file's name")
        if outside := [name for name in (*self.sources, *self.files) if not FILE.fullmatch(name)]:
            raise ValueError(f"{outside[0]!r} is no file in the folder")
        if self.facts.base_revision is not None and not COMMIT.fullmatch(self.facts.base_revision):
            raise ValueError(f"`base_revision` is {self.facts.base_revision!r}, which is no commit")
        if not self.sites:
            raise ValueError("`sites` is empty")

    def _check_pipeline(self) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*(\+[A-Za-z]\w*)*", self.denoiser):
            raise ValueError(f"`denoiser` is {self.denoiser!r}, which is no component's name")
        if self.request.inside and all(map(is_text, self.facts.spaces.values())):
            raise ValueError(
                f"`reach` is {self.request.reach!r}, but no layer inside the denoiser is in `spaces`"
            )


def prefixes_of(denoiser: str) -> dict[str, str]:
    """Component -> the prefix of its layers' names: its name and a dot, or nothing if it is the only one."""
    components = denoiser.split(TOGETHER)
    if len(components) == 1:
        return {denoiser: ""}
    return {component: f"{component}." for component in components}


def refuse_erased_source(source: str | None, sites: Callable[[Record], Mapping[str, Site]]) -> None:
    """
    Raises `AlreadyErasedError` if the model's folder was saved erased and its layers are not the original's.

    They are the original's again if it was saved erased over its own folder and then restored. `sites`
    returns the layers that a record describes.
    """
    if not source or not (Path(source) / RECORD).is_file():
        return
    record = Record.read(Path(source))
    # Saved over its own folder and then restored, a model is the original in spite of the record.
    if fingerprint({name: site.read() for name, site in sites(record).items()}) != record.facts.fingerprint:
        raise AlreadyErasedError(
            f"{source} was saved erased (it has a {RECORD}), and the original weights are not there. "
            "Start from the original model and erase everything at once."
        )


def read_fields(cls: type, data: Any) -> Any:
    """A dataclass from a mapping; keys that it does not know are ignored."""
    check_type("facts", data, dict[str, Any])
    hints = get_type_hints(cls)
    known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
    for name, value in known.items():
        check_type(name, value, hints[name])
    return cls(**known)


def check_type(name: str, value: Any, expected: Any) -> None:
    """Raises `TypeError` unless a value from JSON has this type, such as `dict[str, float]`."""
    origin, inner = get_origin(expected), get_args(expected)
    if expected is Any:
        return
    if origin is UnionType:
        options = [option for option in inner if option is not NoneType]
        if value is not None:
            check_type(name, value, options[0])
        return
    plain = origin or expected
    # Other languages write 1.0 as 1; True is an integer in Python, but not in JSON.
    types = int | float if plain is float else plain
    if not isinstance(value, types) or isinstance(value, bool) != (plain is bool):
        raise TypeError(f"`{name}` is {value!r}, not {expected}")
    if plain is float and not math.isfinite(value):
        raise TypeError(f"`{name}` is {value!r}, not a finite number")
    if plain is list:
        for element in value:
            check_type(name, element, inner[0])
    if plain is dict:
        for key, element in value.items():
            check_type(name, key, inner[0])
            check_type(name, element, inner[1])
