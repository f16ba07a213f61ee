"""One record beside the weights: `save`, `load`, `verify`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import __version__
from . import erasure as store
from .diffusion.erase import RECORD, get_erasure
from .diffusion.hook import RoutingHook, attach_hook
from .diffusion.proof import PROOF_TOLERANCE
from .diffusion.request import prepare
from .diffusion.sites import find_denoiser, find_sites, lora_branches
from .erasure import Erasure
from .errors import ExportError, IncompatibleBaseError, MoreError
from .prototypes import Prototypes
from .remap import Remap


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
    denoiser: str  # the component's folder
    variant: str | None  # of the files, as `save_pretrained` took it
    layout: str  # sha256 over the names and shapes of all its tensors, which are the base's

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


def save(pipe: DiffusionPipeline, folder: str | os.PathLike, *, include_delta: bool = False, **kwargs: Any) -> Path:
    """Save an erased pipeline: `save_pretrained` plus `more_hf.json`, the record of what was done. The pipeline is not changed.

    Args:
        pipe (`DiffusionPipeline`): an erased pipeline.
        folder: where to; written beside its place and moved there when complete.
        include_delta (`bool`, defaults to `False`): also write the thin factors, which `load` needs for a router. Whoever has them
            and these weights can compute the concept back; keep them out of what you publish.
        kwargs: go to `save_pretrained` (`variant`, `max_shard_size`, ...).

    Raises `ExportError` if nothing was erased, if a LoRA is loaded but not fused (its weights would be lost or break the names), or
    if the folder holds other weight files, which could be the original's.
    """
    folder = Path(folder)
    erasure = get_erasure(pipe)
    if erasure is None:
        raise ExportError("Nothing was erased from this pipeline. Call `more_hf.erase_concept` first, or use `pipe.save_pretrained`.")
    denoiser = find_denoiser(pipe)
    if lora_branches(denoiser):
        raise ExportError(
            "A LoRA is loaded beside the edited layers. Call `pipe.unload_lora_weights()` (fuse it first to keep it), then save."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        draft = Path(name) / "draft"
        pipe.save_pretrained(draft, **kwargs)
        record = Record(
            more_hf=__version__,
            versions={package: version(package) for package in ("torch", "diffusers", "transformers")},
            request=erasure.request,
            sites={name: list(site.read().shape) for name, site in erasure.sites.items()},
            guarantees=erasure.guarantees,
            proof=erasure.proof,
            facts=erasure.facts,
            denoiser=denoiser.name,
            variant=kwargs.get("variant"),
            layout=_layout({name: list(tensor.shape) for name, tensor in denoiser.module.state_dict().items()}),
        )
        (draft / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", "utf-8")
        if include_delta:
            _write_delta(erasure, draft / DELTA)
        shift = erasure.remap.shift() if erasure.remap else _shift(pipe, erasure.request)
        if not (check := _check_files(draft, record, shift)).ok:
            failed = "; ".join(f"{what}: {finding}" for what, passed, finding in check.checks if not passed)
            raise ExportError(
                f"What would be saved is not the erased model ({failed}). Was a LoRA fused or the model trained since, or is this inside "
                "`more_hf.disabled`? Undo that, then save."
            )
        written = {path.relative_to(draft) for path in draft.rglob("*") if path.is_file()}
        others = [path for path in folder.rglob("*") if path.name.endswith(WEIGHT_FILES) and path.relative_to(folder) not in written]
        if others:
            raise ExportError(
                f"{folder} already holds {', '.join(str(path.relative_to(folder)) for path in others[:5])}, which this save does not "
                "replace: the original's weights under another name, or factors of an earlier save. Remove them "
                "or choose an empty folder (git history, if any, keeps old files)."
            )
        for path in sorted(written, key=lambda path: path.name == RECORD):  # the record last: it vouches for the rest
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(draft / path, folder / path)
    return folder


def load(source: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline:
    """Load an erased pipeline with its record, from a folder that `save` wrote or such a repository on the Hub.

    `get_erasure` then knows what was erased, and a further `erase_concept` says that the originals are needed. A router is put back
    where the factors are beside the weights. `kwargs` go to `from_pretrained`. Raises `MoreError` without a record.
    """
    folder = Path(source)
    if not folder.is_dir():
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        folder = Path(snapshot_download(str(source), allow_patterns=[RECORD, DELTA], **hub))
    record = Record.read(folder)
    pipe = DiffusionPipeline.from_pretrained(source, **kwargs)
    denoiser = find_denoiser(pipe)
    sites = find_sites(pipe, denoiser)
    shapes = {name: list(site.read().shape) for name, site in sites.items()}
    if shapes != record.sites:
        raise IncompatibleBaseError(f"The record in {folder} is of a model with other layers ({len(record.sites)}, here {len(shapes)}).")
    remap = _read_delta(folder / DELTA) if (folder / DELTA).is_file() else None
    erasure = Erasure(record.request, remap, sites, None, record.guarantees, record.proof, record.facts)
    if remap is not None and erasure.router is not None:
        erasure.hook = RoutingHook(remap, erasure.router, pipe._execution_device)
        attach_hook(denoiser.module, erasure)
    store.remember(denoiser.module, erasure)
    return pipe


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


def verify(folder: str | os.PathLike) -> Verification:
    """Check a saved folder against its record, from the files alone: are these weights the edited ones?

    The prototypes are computed again with the folder's text encoder. For every edited layer in every weight file of the denoiser,
    ‖W′ (p_f − p̄_t)‖ is compared with ‖W (p_f − p̄_t)‖ of the original, which the record holds: near 0 for an edited layer, 1 for an
    original one. Names and shapes must be the base's, and no other weight file may be there. Raises `MoreError` without a record.
    """
    folder = Path(folder)
    record = Record.read(folder)
    without = {record.denoiser: None, "vae": None, "safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(folder, variant=record.variant, **without)
    return _check_files(folder, record, _shift(pipe, record.request))


def _shift(pipe: DiffusionPipeline, request: dict[str, Any]) -> Tensor:
    """P̄_t − P_F, `(d, f)`: it depends on neither the solver nor retained names."""
    return Remap.fit(**prepare(pipe, {**request, "retain": []}, ()), solver="pinv").shift()


def _check_files(folder: Path, record: Record, shift: Tensor) -> Verification:
    """`shift` is P̄_t − P_F, `(d, f)`."""
    files = [path for path in (folder / record.denoiser).rglob("*") if path.name.endswith(WEIGHT_FILES) and path.suffix != ".json"]
    shapes: dict[str, list[int]] = {}
    worst, finding, seen = 0.0, "no layer found", set()
    for path in files:
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            shapes.update({key: list(file.get_slice(key).get_shape()) for key in keys})
            for name in [name for name in record.sites if f"{name}.weight" in keys]:
                weight = file.get_tensor(f"{name}.weight")
                seen.add(name)
                left = float("inf")
                if list(weight.shape) == record.sites[name]:
                    left = float((weight.float() @ shift.float()).norm()) / record.facts["separation"][name]
                used = left / PROOF_TOLERANCE[weight.dtype]
                if not used <= worst:
                    worst, finding = used, f"worst: `{name}` in {path.name}, {left:.1e} of the original's ({weight.dtype})"
    strays = [path for path in files if path.suffix != ".safetensors"]
    strays += [path for path in folder.iterdir() if path.name.endswith(WEIGHT_FILES) and path.name != DELTA]
    return Verification(
        (
            ("names and shapes are the base's", _layout(shapes) == record.layout, f"{len(shapes)} tensors"),
            ("every edited layer is there", len(seen) == len(record.sites), f"{len(seen)} of {len(record.sites)}"),
            ("each sends p_f where p_t goes", bool(seen) and worst < 1, finding),
            ("no weights under another name", not strays, ", ".join(path.name for path in strays) or "none"),
        )
    )


def _layout(shapes: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def _write_delta(erasure: Erasure, path: Path) -> None:
    remap = erasure.remap
    if remap is None:
        raise ExportError("The factors of this erasure are not here: it was loaded without them. Save with include_delta=False.")
    tensors = {
        "prototypes": remap.prototypes.matrix,
        "counts": remap.prototypes.counts,
        "dual": remap.dual,
        "targets": remap.targets,
        "forget": torch.tensor(remap.forget),
    }
    facts = {"names": remap.prototypes.names, "solver": remap.solver, "condition_number": remap.condition_number}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"more_hf": json.dumps(facts)})


def _read_delta(path: Path) -> Remap:
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["more_hf"])
        return Remap(
            prototypes=Prototypes(file.get_tensor("prototypes"), tuple(facts["names"]), file.get_tensor("counts")),
            forget=tuple(file.get_tensor("forget").tolist()),
            targets=file.get_tensor("targets"),
            dual=file.get_tensor("dual"),
            solver=facts["solver"],
            condition_number=facts["condition_number"],
        )
