"""The record beside saved weights, the factors in a file of their own, and the check of a folder against them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.erasure import Erasure
from ..core.errors import ExportError
from ..core.install import PROOF_TOLERANCE
from ..core.prototypes import Prototypes
from ..core.record import Record
from ..core.remap import Remap
from ..core.routers import PrototypeRouter
from ..core.site import fingerprint


logger = logging.getLogger(__name__)

DELTA = "more_hf_delta.safetensors"
WEIGHT_FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".index.json")


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
                    shift = shifts[record.facts.spaces.get(name, "tokens")].float()
                    left = float((weight.float() @ shift).norm()) / record.facts.separation[name]
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
    return weight[..., : record.sites[name][1]] if name in record.facts.spaces else weight


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
    if not erasure.remaps:
        raise ExportError("The factors of this erasure are not here: it was loaded without them. Save with include_delta=False.")
    tensors, facts = {}, {}
    for space, remap in erasure.remaps.items():
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
