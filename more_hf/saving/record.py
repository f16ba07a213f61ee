"""The record beside saved weights, the factors in a file of their own, and the check of a folder against them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.erasure import PROOF_TOLERANCE, RECORD, Erasure, Site, fingerprint
from ..core.errors import AlreadyErasedError, ExportError, IncompatibleBaseError, MoreError
from ..core.prototypes import Prototypes
from ..core.remap import Remap
from ..core.routers import PrototypeRouter


logger = logging.getLogger(__name__)

DELTA = "more_hf_delta.safetensors"
WEIGHT_FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".index.json")


@dataclass
class Record:
    """What `more_hf.json` holds. Every field is mandatory; keys of a newer version are ignored with a warning."""

    more_hf: str  # version that wrote it
    versions: dict[str, str]
    request: dict[str, Any]
    sites: dict[str, list[int]]
    guarantees: dict[str, float]
    proof: dict[str, float]
    facts: dict[str, Any]
    denoiser: str  # the component's folder, "." for a classifier
    variant: str | None  # of the files, as `save_pretrained` took it
    layout: str  # sha256 over the names and shapes of all its tensors, which are the base's
    edited: str  # fingerprint of the edited layers as saved; facts["fingerprint"] is the one of the base's

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Raises `MoreError` if the folder has no record, and `IncompatibleBaseError` if a key is missing."""
        path = folder / RECORD
        if not path.is_file():
            raise MoreError(f"{folder} has no {RECORD}. It was not written by `more_hf.save`, so there is nothing to check it against.")
        data = json.loads(path.read_text("utf-8"))
        known = [field.name for field in fields(cls)]
        if missing := [name for name in known if name not in data]:
            raise IncompatibleBaseError(f"{path} lacks {', '.join(map(repr, missing))}. Save the erased model again.")
        if newer := [name for name in data if name not in known]:
            logger.warning("%s has keys that this version does not know and ignores: %s", path, ", ".join(newer))
        return cls(**{name: data[name] for name in known})


@dataclass(frozen=True)
class Verification:
    """What `verify` found: `(check, passed, finding)` per line."""

    checks: tuple[tuple[str, bool, str], ...]

    @property
    def ok(self) -> bool:
        return all(passed for _, passed, _ in self.checks)

    def to_markdown(self) -> str:
        lines = [f"| {check} | {'yes' if passed else 'NO'} | {finding} |" for check, passed, finding in self.checks]
        return "\n".join(["| check | holds | finding |", "|---|---|---|", *lines])


def refuse_erased_source(source: str | None, sites: Callable[[Record], Mapping[str, Site]]) -> None:
    """Raise `AlreadyErasedError` if the model's folder was saved erased and its layers are not the base's. They are if the original was
    saved erased over its own folder and then restored. `sites` gives the layers that the record is about."""
    if not source or not (Path(source) / RECORD).is_file():
        return
    record = Record.read(Path(source))
    if fingerprint({name: site.read() for name, site in sites(record).items()}) != record.facts["fingerprint"]:
        raise AlreadyErasedError(
            f"{source} was saved erased (it has a {RECORD}), and the original weights are not there. "
            "Start from the original model and erase everything at once."
        )


def by_space(erasure: Erasure) -> dict[str, Remap]:
    """Space -> its factors; empty for an erasure that was loaded without them."""
    return {site.space: erasure.remap_of(name) for name, site in erasure.sites.items() if erasure.remap is not None}


def check_files(folder: Path, record: Record, shifts: dict[str, Tensor]) -> Verification:
    """`shifts` has P̄_t − P_F, `(d, f)`, of every space; without any the edited layers are compared with what was saved, by fingerprint."""
    files = [
        path
        for path in (folder / record.denoiser).rglob("*")
        if path.name.endswith(WEIGHT_FILES) and path.suffix != ".json" and path.name != DELTA
    ]
    shapes: dict[str, list[int]] = {}
    worst, finding, seen = 0.0, "no layer found", set()
    for path in files:
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            shapes.update({key: list(file.get_slice(key).get_shape()) for key in keys})
            for name in [name for name in record.sites if f"{name}.weight" in keys]:
                weight = _columns(file.get_tensor(f"{name}.weight"), record, name)
                seen.add(name)
                left = float("inf")
                if shifts and list(weight.shape) == record.sites[name]:
                    shift = shifts[record.facts["spaces"].get(name, "tokens")].float()
                    left = float((weight.float() @ shift).norm()) / record.facts["separation"][name]
                used = left / PROOF_TOLERANCE[weight.dtype]
                if not used <= worst:
                    worst, finding = used, f"worst: `{name}` in {path.name}, {left:.1e} of the original's ({weight.dtype})"
    strays = [path for path in files if path.suffix != ".safetensors"]
    strays += [path for path in folder.iterdir() if path.name.endswith(WEIGHT_FILES) and path.name != DELTA and path not in files]
    same = ("each sends p_f where p_t goes", bool(seen) and worst < 1, finding)
    if not shifts:
        strays += [path for path in files if path not in strays and path not in _weight_files(folder, record)]
        same = ("the edited layers are those that were saved", edited_in(folder, record) == record.edited, record.edited[:12])
    return Verification(
        (
            ("names and shapes are the base's", layout_of(shapes) == record.layout, f"{len(shapes)} tensors"),
            ("every edited layer is there", len(seen) == len(record.sites), f"{len(seen)} of {len(record.sites)}"),
            same,
            ("no weights under another name", not strays, ", ".join(path.name for path in strays) or "none"),
        )
    )


def edited_in(folder: Path, record: Record) -> str:
    """The fingerprint of the edited layers in the files, whatever dtype they are loaded in."""
    weights = {}
    for path in _weight_files(folder, record):
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            found = {name: file.get_tensor(f"{name}.weight") for name in record.sites if f"{name}.weight" in keys}
            weights |= {name: _columns(weight, record, name) for name, weight in found.items()}
    return fingerprint(weights)


def _weight_files(folder: Path, record: Record) -> list[Path]:
    """The files that `from_pretrained` reads for the record's variant, shards too."""
    suffix = f".{re.escape(record.variant)}" if record.variant else ""
    files = sorted((folder / record.denoiser).glob("*.safetensors"))
    return [path for path in files if path.name != DELTA and re.fullmatch(rf"[^.-]+{suffix}(-\d+-of-\d+)?\.safetensors", path.name)]


def _columns(weight: Tensor, record: Record, name: str) -> Tensor:
    """The columns of a site's weight that were edited, where others read something else than text."""
    return weight[..., : record.sites[name][1]] if name in record.facts["spaces"] else weight


def shapes_in(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a folder's safetensors files."""
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {key: list(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes


def layout_of(shapes: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def write_delta(erasure: Erasure, path: Path) -> None:
    if erasure.remap is None:
        raise ExportError("The factors of this erasure are not here: it was loaded without them. Save with include_delta=False.")
    tensors, facts = {}, {}
    for space, remap in by_space(erasure).items():
        tensors[f"{space}.prototypes"] = remap.prototypes.matrix
        tensors[f"{space}.counts"] = remap.prototypes.counts
        tensors[f"{space}.dual"] = remap.dual
        tensors[f"{space}.targets"] = remap.targets
        tensors[f"{space}.forget"] = torch.tensor(remap.forget)
        facts[space] = {"names": remap.prototypes.names, "solver": remap.solver, "condition_number": remap.condition_number}
    if isinstance(router := getattr(erasure.hook, "router", None), PrototypeRouter):
        tensors["router.weight"] = router.weight.cpu()  # it may be trained
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"more_hf": json.dumps(facts)})


def read_delta(path: Path) -> dict[str, Remap]:
    """Space -> its factors."""
    with safe_open(path, "pt") as file:
        return {
            space: Remap(
                prototypes=Prototypes(file.get_tensor(f"{space}.prototypes"), tuple(facts["names"]), file.get_tensor(f"{space}.counts")),
                forget=tuple(file.get_tensor(f"{space}.forget").tolist()),
                targets=file.get_tensor(f"{space}.targets"),
                dual=file.get_tensor(f"{space}.dual"),
                solver=facts["solver"],
                condition_number=facts["condition_number"],
            )
            for space, facts in json.loads(file.metadata()["more_hf"]).items()
        }
