"""What was done to one model: sites, originals, merge, restore. Knows linear layers only; families live elsewhere.

Originals and factors are kept in memory, in a `WeakKeyDictionary` beside the model and not on it: whatever pickles, copies or
saves the model cannot carry them along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .errors import AlreadyErasedError, IncompatibleBaseError, TargetNotFoundError
from .remap import Remap


EDITABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RECORD = "more_hf.json"  # written by `more_hf.save` beside what was erased
# What a proof by run accepts, in units of the output difference between forget and target before the edit: rounding of the weights
# and features in the model's dtype. A single missed layer shows as 0.05 or more.
PROOF_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
ERASED = "more_hf_erased"  # names of what was erased; a plain attribute, so that a deepcopy or an unpickled model still says so


class Site:
    """A linear layer that reads the features, and where its weight really lives.

    Under sequential CPU offload the parameter is an empty stand-in on the meta device, and the weight is in the `weights_map` of
    accelerate's hook. `read` and `write` go there; everything else in the library goes through them.

    `space` names the features that the layer reads, where a model has several kinds. With `columns` only the first so many columns
    read them, and are the weight that `read` and `write` know.
    """

    def __init__(self, name: str, module: nn.Module, *, space: str = "tokens", columns: int | None = None):
        """Raises `TargetNotFoundError`, naming the layer and the remedy, unless the weight can be edited in place."""
        self.name, self.module, self.space, self.columns = name, module, space, columns
        self._check()

    def _offload_map(self) -> tuple[Any, str] | None:
        """The mapping that holds the weight while it is offloaded, and its key."""
        hook = self.module.__dict__.get("_hf_hook")
        for single in getattr(hook, "hooks", (hook,)):  # accelerate's SequentialHook holds several
            if getattr(single, "offload", False):
                data, key = single.weights_map, "weight"
                while hasattr(data, "prefix"):  # PrefixedDataset
                    data, key = data.dataset, data.prefix + key
                if hasattr(data, "state_dict") and key in data.state_dict:  # OffloadedWeightsLoader, the part in memory
                    data = data.state_dict
                return data, key
        return None

    def _check(self) -> None:
        where = f"`{self.name}` ({type(self.module).__name__})"
        if type(self.module) is not nn.Linear:
            raise TargetNotFoundError(
                f"{where} is not a plain nn.Linear: it is quantized or wrapped, and its weight cannot be edited in place. "
                "Erase from the unquantized model, save it, and quantize what was saved."
            )
        offload = self._offload_map()
        if offload is not None and not isinstance(offload[0], dict):
            raise TargetNotFoundError(
                f"The weight of {where} is offloaded to disk, where an edit would not reach it. "
                "Load the model without an offload folder, erase, save, and load it with offloading again."
            )
        weight = self.read()
        if type(weight) is not Tensor or weight.is_meta or weight.ndim != 2 or weight.dtype not in EDITABLE:
            raise TargetNotFoundError(
                f"The weight of {where} is {type(weight).__name__} {weight.dtype} of shape {tuple(weight.shape)} on "
                f"{weight.device}: quantized, cast to fp8, sharded (FSDP, ZeRO-3) or not loaded. An edit needs the whole matrix in "
                "fp16, bf16, fp32 or fp64. Erase from the full-precision model, save it, and quantize or shard what was saved."
            )

    def _whole(self) -> Tensor:
        offload = self._offload_map()
        return self.module.weight.data if offload is None else offload[0][offload[1]]

    def _part(self, weight: Tensor) -> Tensor:
        return weight if self.columns is None else weight[:, : self.columns]

    def read(self) -> Tensor:
        """The weight, `(out_features, in_features)` or `(out_features, columns)`; not a copy where it is resident."""
        return self._part(self._whole())

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Put values into the weight in place, in its dtype and on its device, so that everything that shares it sees them."""
        weight = self._whole()
        self._part(weight).copy_(value)
        offload = self._offload_map()
        if offload is not None:
            offload[0][offload[1]] = weight  # a map that hands out copies has to be told


def check_unshared(sites: Mapping[str, Site], model: nn.Module) -> None:
    """Raises `TargetNotFoundError` if another layer of the model shares a site's weight, and would be edited with it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            owners.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    for name, site in sites.items():
        sharing = owners.get(site.read().untyped_storage().data_ptr(), [])
        if len(sharing) > 1:
            raise TargetNotFoundError(
                f"The weight of `{name}` is shared by {sharing}; editing one would edit all. Give each layer its own copy first."
            )


@contextmanager
def written(sites: Mapping[str, Site], values: Mapping[str, Tensor], *, keep: bool) -> Iterator[None]:
    """Hold `values` in all sites during the block, and after it if `keep`; else, and after any exception, what was there before."""
    before = {name: site.read().clone() for name, site in sites.items()}
    try:
        for name, site in sites.items():
            site.write(values[name])
        yield
    except BaseException:
        _put(sites, before)
        raise
    if not keep:
        _put(sites, before)


def _put(sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> None:
    """Write all sites, and only then raise an interruption that came in between: a mixture of two models must not be left."""
    interruption = None
    for name, site in sites.items():
        try:
            site.write(values[name])
        except BaseException as error:
            interruption = error
            site.write(values[name])
    if interruption is not None:
        raise interruption


@dataclass
class Erasure:
    """One erasure of one model, as `get_erasure` returns it.

    Attributes:
        request (`dict`): what was asked for: `concepts` (name to aliases), `remap_to` (name to targets), `retain`, `tokens`, `solver`,
            `num_experts`, `router`, `seed`. A refit starts from it.
        remap (`Remap`, *optional*): the factors; `None` for a model loaded without them.
        sites (`dict[str, Site]`): the edited layers.
        originals (`dict[str, Tensor]`, *optional*): their weights before the edit, on the CPU; `None` if they were not kept.
        guarantees (`dict`): `Remap.verify()`.
        proof (`dict`): the proof by run.
        facts (`dict`): what else was measured: solver and why it was chosen, how far retained names move, leaks, fingerprint of the base.
        hook (*optional*): the routing hook on the model.
        remaps (`dict[str, Remap]`): where sites read different features, as two heads may, or a prompt's tokens and its pooled
            embedding: the factors of each site that `remap` is not for; else empty.
    """

    request: dict[str, Any]
    remap: Remap | None
    sites: dict[str, Site]
    originals: dict[str, Tensor] | None
    guarantees: dict[str, float]
    proof: dict[str, float]
    facts: dict[str, Any]
    hook: Any = None
    handle: Any = field(default=None, repr=False)
    remaps: dict[str, Remap] = field(default_factory=dict, repr=False)

    def remap_of(self, site: str) -> Remap:
        """The factors that edit this site."""
        return self.remaps.get(site, self.remap)

    @property
    def router(self) -> str | None:
        return self.request["router"]

    @property
    def concepts(self) -> list[str]:
        return list(self.request["concepts"])

    def to_dict(self) -> dict[str, Any]:
        """Everything but tensors, ready for JSON."""
        return {
            **self.request,
            "sites": {name: list(site.read().shape) for name, site in self.sites.items()},
            "guarantees": self.guarantees,
            "proof": self.proof,
            **self.facts,
        }

    def to_markdown(self) -> str:
        """A table of what was done and what was measured."""
        request, facts = self.request, self.facts
        sent = {
            name: f"the mean of {', '.join(targets)}" if len(targets) > 1 else targets[0] if targets else "nothing (projected out)"
            for name, targets in request["remap_to"].items()
        }
        kept = facts["retained_moved"].items()
        rank = f"rank {facts['rank']}{' or less' if self.remaps else ' each'}"
        rows = [
            (
                "forgotten",
                "; ".join(name + (f" (also {', '.join(also)})" if also else "") for name, also in request["concepts"].items()),
            ),
            ("sent to", "; ".join(f"{name} → {target}" for name, target in sent.items())),
            ("retained", ", ".join(["special tokens and empty prompt (exact)", *(f"{n} (moves by {100 * m:.2g} %)" for n, m in kept)])),
            ("tokens", request["tokens"]),
            ("solver", f"{facts['solver']}: {facts['solver_reason']}"),
            ("edited", f"{len(self.sites)} layers, {rank}; {facts['num_experts']} expert(s)"),
            ("router", request["router"] or "none: the mean expert is in the weights"),
            ("condition number of P", f"{facts['condition_number']:.1f}"),
            *((f"guarantee `{key}`", f"{value:.1e}") for key, value in self.guarantees.items() if key != "rank"),
            *((f"proof by run `{key}`", f"{value:.1e}") for key, value in self.proof.items()),
            *(("leak", leak) for leak in facts["leaks"]),
        ]
        return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])

    def __str__(self) -> str:
        return self.to_markdown()

    @contextmanager
    def original_weights(self) -> Iterator[None]:
        """The original model inside the block, the erased one after it, bit for bit. Raises `AlreadyErasedError` without originals."""
        with written(self.sites, self.require_originals(), keep=False):
            yield

    def require_originals(self) -> dict[str, Tensor]:
        if self.originals is None:
            base = self.facts.get("base") or "the original model"
            raise AlreadyErasedError(
                f"{', '.join(map(repr, self.concepts))} is already erased from this model and the original weights are not here, so "
                f"it can be neither restored nor fitted jointly with another concept. Start from {base} and pass all concepts at once."
            )
        return self.originals

    def check_unchanged(self) -> None:
        """Raises `IncompatibleBaseError` if a site no longer holds this edit, beyond what a cast of the model explains."""
        changed = [name for name, original in self.require_originals().items() if not self._holds_edit(name, original)]
        if changed:
            raise IncompatibleBaseError(
                f"{len(changed)} of {len(self.sites)} edited layers changed since the edit (first: `{changed[0]}`): a LoRA was fused or "
                "the model was trained. Undo that first (`pipe.unfuse_lora()`), or start from the base model."
            )

    def _holds_edit(self, name: str, original: Tensor) -> bool:
        weight = self.sites[name].read()
        merged = self.remap_of(name).merged(original.to(weight.device))
        # a model cast down and up again holds values rounded on the way
        routes = [
            merged.to(weight.dtype),
            *(merged.to(half).to(weight.dtype) for half in (torch.float16, torch.bfloat16)),
        ]
        rtol = 4 * torch.finfo(weight.dtype).eps  # another device sums in another order; a LoRA fused and unfused leaves W + d − d
        return any(torch.allclose(weight, route, rtol=rtol, atol=rtol * float(route.abs().max())) for route in routes)


_ERASURES: WeakKeyDictionary[nn.Module, Erasure] = WeakKeyDictionary()


def find_erasure(model: nn.Module) -> Erasure | None:
    """The erasure of a denoiser or classifier, or `None`."""
    return _ERASURES.get(model)


def require_editable(model: nn.Module) -> Erasure | None:
    """The model's erasure if it can be refitted, `None` if it has none. Raises if the model was erased and cannot be refitted."""
    erasure = find_erasure(model)
    names = model.__dict__.get(ERASED)
    if erasure is None and names:
        raise AlreadyErasedError(
            f"This is a copy of a model from which {', '.join(map(repr, names))} was erased; copies carry no original weights. Call "
            "on the model it was copied from, or start from the original and pass all concepts at once."
        )
    if erasure is not None:
        erasure.check_unchanged()
    return erasure


def fingerprint(originals: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 values of the weights before the edit."""
    digest = hashlib.sha256()
    for name in sorted(originals):
        weight = originals[name].float().contiguous().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def apply(model: nn.Module, erasure: Erasure, prove: Callable[[], dict[str, float]], *, keep_originals: bool) -> None:
    """Merge the mean expert into every site, run the proof, and remember the erasure; all of it or nothing.

    Every delta is computed and checked to be finite before a weight is written. If writing or the proof fails, the sites get
    back exactly what they held.
    """
    originals = erasure.originals
    merged = {}
    for name, site in erasure.sites.items():
        weight = site.read()
        merged[name] = erasure.remap_of(name).merged(originals[name].to(weight.device)).to(weight.dtype)
        if not torch.isfinite(merged[name]).all():
            raise IncompatibleBaseError(f"The edited weight of `{name}` is not finite in {merged[name].dtype}. Nothing was changed.")
    with written(erasure.sites, merged, keep=True):
        erasure.proof = prove()
    if not keep_originals:
        erasure.originals = None
    _ERASURES[model] = erasure
    setattr(model, ERASED, tuple(erasure.concepts))


def forget(model: nn.Module) -> None:
    """Write the originals back, bit for bit, and drop the erasure."""
    erasure = _ERASURES[model]
    with written(erasure.sites, erasure.originals, keep=True):
        pass
    del _ERASURES[model]
    delattr(model, ERASED)


def remember(model: nn.Module, erasure: Erasure) -> None:
    """Attach a record to a model that was loaded erased."""
    _ERASURES[model] = erasure
    setattr(model, ERASED, tuple(erasure.concepts))
