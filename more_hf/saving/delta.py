"""Write and read the thin factors of an erasure; with them, the erased weights give back the original's."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..core.erasure import Erasure
from ..core.errors import ExportError
from ..core.gate import Rewrite
from ..core.prototypes import Prototypes
from ..core.remap import Remap
from ..core.routers import PrototypeRouter
from .contents import DELTA
from .files import reading


ROUTER = "router.weight"  # the weight of a `PrototypeRouter`, which may be trained


def write_delta(erasure: Erasure, folder: Path) -> None:
    """
    Write the factors of every space, and the router's weight if it has one.

    Raises:
        `ExportError`: the factors are not available.
    """
    if not erasure.remaps:
        raise ExportError(
            "The factors of this erasure are not available, because it was loaded without them. Save with "
            "include_delta=False."
        )
    tensors, facts = {}, {}
    for layer, rewrite in erasure.rewrites.items():
        for field in fields(Rewrite):
            tensors[f"{layer}.{field.name}"] = getattr(rewrite, field.name)
    for space, remap in erasure.remaps.items():
        tensors[f"{space}.prototypes"] = remap.prototypes.matrix
        tensors[f"{space}.counts"] = remap.prototypes.counts
        tensors[f"{space}.dual"] = remap.dual
        tensors[f"{space}.targets"] = remap.targets
        tensors[f"{space}.forget"] = torch.tensor(remap.forget)
        facts[space] = {
            "names": remap.prototypes.names,
            "solver": remap.solver,
            "condition_number": remap.condition_number,
            "strength": remap.strength,
        }
    router = None if erasure.hook is None else erasure.hook.router
    if isinstance(router, PrototypeRouter):
        tensors[ROUTER] = router.weight.cpu()
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    metadata = {"more_hf": json.dumps(facts), "rewrites": json.dumps([*erasure.rewrites])}
    save_file(tensors, folder / DELTA, metadata=metadata)


def read_delta(folder: Path) -> dict[str, Remap]:
    """
    Space -> its factors; empty if they are not in the folder.

    Raises:
        `IncompatibleBaseError`: the file cannot be read.
    """
    path = folder / DELTA
    if not path.is_file():
        return {}
    remaps = {}
    with reading(path), safe_open(path, "pt") as file:
        for space, facts in json.loads(file.metadata()["more_hf"]).items():
            prototypes = Prototypes(
                file.get_tensor(f"{space}.prototypes"),
                tuple(facts["names"]),
                file.get_tensor(f"{space}.counts"),
            )
            remaps[space] = Remap(
                prototypes=prototypes,
                forget=tuple(file.get_tensor(f"{space}.forget").tolist()),
                targets=file.get_tensor(f"{space}.targets"),
                dual=file.get_tensor(f"{space}.dual"),
                solver=facts["solver"],
                condition_number=facts["condition_number"],
                strength=facts["strength"],
            )
    return remaps


def read_rewrites(folder: Path) -> dict[str, Rewrite]:
    """Layer -> its change by gates, if the file has any. Raises as `read_delta`."""
    path = folder / DELTA
    if not path.is_file():
        return {}
    with reading(path), safe_open(path, "pt") as file:
        return {
            layer: Rewrite(*(file.get_tensor(f"{layer}.{field.name}") for field in fields(Rewrite)))
            for layer in json.loads(file.metadata().get("rewrites", "[]"))
        }


def read_router(folder: Path) -> torch.Tensor | None:
    """The router's weight, if the file has it."""
    path = folder / DELTA
    with reading(path), safe_open(path, "pt") as file:
        return file.get_tensor(ROUTER) if ROUTER in file.keys() else None
