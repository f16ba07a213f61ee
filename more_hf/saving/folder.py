"""One record beside the weights: `save`, `load`, `verify`."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from .. import __version__
from ..api import get_erasure
from ..core.erasure import Erasure
from ..core.errors import ExportError, IncompatibleBaseError, MoreError
from ..core.hook import attach_hooks
from ..core.record import RECORD, Record
from ..core.registry import register
from ..core.request import ConceptRequest
from ..core.site import fingerprint
from ..diffusion.erasure import ConceptErasure
from ..diffusion.hook import make_hooks
from ..diffusion.plan import prepare
from ..diffusion.sites import find_denoiser, find_sites, lora_branches
from .classifier import load_classifier, savable_classifier
from .record import (
    DELTA,
    WEIGHT_FILES,
    Verification,
    check_files,
    edited_in,
    layout_of,
    read_delta,
    shapes_in,
    write_delta,
)


def save(pipe: DiffusionPipeline | nn.Module, folder: str | os.PathLike, *, include_delta: bool = False, **kwargs: Any) -> Path:
    """Save what was erased: `save_pretrained` plus `more_hf.json`, the record of what was done. The model is not changed.

    Args:
        pipe (`DiffusionPipeline` or `nn.Module`): an erased pipeline, or an erased classifier of Transformers.
        folder: where to; written beside its place and moved there when complete.
        include_delta (`bool`, defaults to `False`): also write the thin factors, which `load` needs for a router, and for the
            features of a classifier: without them its features are the original's. Whoever has them and these weights can compute
            the concept back; keep them out of what you publish.
        kwargs: go to `save_pretrained` (`variant`, `max_shard_size`, ...).

    Raises `ExportError` if nothing was erased, if a LoRA is loaded but not fused (its weights would be lost or break the names), or
    if the folder holds other weight files, which could be the original's.
    """
    folder = Path(folder)
    erasure = get_erasure(pipe)
    if erasure is None:
        raise ExportError(
            f"Nothing was erased from this {type(pipe).__name__}. Call `more_hf.erase_concept` or `more_hf.erase_classes` first, or use "
            "its `save_pretrained`."
        )
    whole, part, name, revision = _parts(pipe, erasure)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        draft = Path(beside) / "draft"
        whole.save_pretrained(draft, **kwargs)
        shapes = {name: list(tensor.shape) for name, tensor in part.state_dict().items()}
        if whole is part:  # Transformers writes some models under names of its earlier versions
            shapes = shapes_in(draft)
        record = Record(
            more_hf=__version__,
            versions={package: version(package) for package in ("torch", "diffusers", "transformers")},
            request=erasure.request,
            sites={name: list(site.read().shape) for name, site in erasure.sites.items()},
            guarantees=erasure.guarantees,
            proof=erasure.proof,
            facts=replace(erasure.facts, base_revision=erasure.facts.base_revision or revision),
            denoiser=name,
            variant=kwargs.get("variant"),
            layout=layout_of(shapes),
            edited=fingerprint({name: site.read() for name, site in erasure.sites.items()}),
        )
        (draft / RECORD).write_text(record.to_json(), "utf-8")
        if include_delta:
            write_delta(erasure, draft / DELTA)
        shifts = {space: remap.shift() for space, remap in erasure.remaps.items()}
        if not shifts and not isinstance(pipe, nn.Module):
            shifts = _shifts(pipe, erasure.request)
        if not (check := check_files(draft, record, shifts)).ok:
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


def _parts(pipe: DiffusionPipeline | nn.Module, erasure: Erasure) -> tuple[DiffusionPipeline | nn.Module, nn.Module, str, str | None]:
    """What is saved, the module in it that was edited, that module's folder, and the commit that it was loaded from."""
    if isinstance(pipe, nn.Module):
        model = savable_classifier(pipe, erasure)
        return model, model, ".", getattr(model.config, "_commit_hash", None)
    denoiser = find_denoiser(pipe)
    if lora_branches(denoiser):
        raise ExportError(
            "A LoRA is loaded beside the edited layers. Call `pipe.unload_lora_weights()` (fuse it first to keep it), then save."
        )
    return pipe, denoiser.module, denoiser.name, _commit(denoiser.module.config.get("_name_or_path"))


def load(source: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline | nn.Module:
    """Load an erased pipeline or classifier with its record, from a folder that `save` wrote or such a repository on the Hub.

    `get_erasure` then knows what was erased, and a further `erase_concept` says that the originals are needed. A router, or a
    classifier's hook, is put back where the factors are beside the weights; without them a classifier's features are the original's,
    and only its predictions forget. Record, factors and weights come from one commit, even if the repository is pushed to
    meanwhile. No code from the repository runs, and no pickle is opened.

    Args:
        source: a folder, or a repository's name.
        kwargs: go to `from_pretrained` (`dtype`, `revision`, `token`, `cache_dir`, ...).

    Raises:
        `MoreError`: there is no record, or an argument would run code or open a pickle; `IncompatibleBaseError`: the record lacks a
        key, or the weights are not those that it was written for.

    Example:

        >>> import more_hf
        >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
        >>> folder = more_hf.save(pipe, "emoji-sd-without-blobmoji")
        >>> print(more_hf.get_erasure(more_hf.load(folder)))
    """
    if unsafe := [key for key in ("trust_remote_code", "custom_pipeline", "use_safetensors") if key in kwargs]:
        raise MoreError(
            f"`load` does not take `{unsafe[0]}`: it runs no code of a repository and opens no pickle. If you trust {source}, use "
            "`DiffusionPipeline.from_pretrained`."
        )
    folder = Path(source)
    if not folder.is_dir():
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        folder = Path(snapshot_download(str(source), allow_patterns=[RECORD, DELTA], **hub))
        kwargs["revision"] = folder.name  # the commit
    record = Record.read(folder)
    if (variant := kwargs.pop("variant", record.variant)) != record.variant:
        raise IncompatibleBaseError(f"The record in {folder} is of the files of variant {record.variant!r}, not {variant!r}.")
    if record.denoiser == ".":
        return load_classifier(source, folder, record, **kwargs)
    pipe = DiffusionPipeline.from_pretrained(source, variant=variant, use_safetensors=True, **kwargs)
    denoiser = find_denoiser(pipe)
    sites = find_sites(pipe, denoiser, pooled=record.request.pooled)
    shapes = {name: list(site.read().shape) for name, site in sites.items()}
    if shapes != record.sites:
        raise IncompatibleBaseError(f"The record in {folder} is of a model with other layers ({len(record.sites)}, here {len(shapes)}).")
    if (found := edited_in(folder, record)) != record.edited:
        raise IncompatibleBaseError(
            f"The edited layers in {folder / record.denoiser} have the fingerprint {found}, but the record beside them was written for "
            f"{record.edited}: the weights were replaced or trained since. Erase from the original model again, or use "
            "`DiffusionPipeline.from_pretrained`, which reads no record."
        )
    remaps = read_delta(folder / DELTA) if (folder / DELTA).is_file() else {}
    erasure = ConceptErasure(record.request, record.facts, sites, remaps, None, record.guarantees, record.proof)
    erasure.hooks = make_hooks(denoiser, erasure, pipe._execution_device)
    attach_hooks(erasure.hooks, [denoiser.module])
    register(denoiser.module, erasure)
    return pipe


def verify(folder: str | os.PathLike) -> Verification:
    """Check a saved folder against its record, from the files alone: are these weights the edited ones?

    The prototypes are computed again with the folder's text encoder. For every edited layer in every weight file of the denoiser,
    ‖W′ (p_f − p̄_t)‖ is compared with ‖W (p_f − p̄_t)‖ of the original, which the record holds: near 0 for an edited layer, 1 for an
    original one. Names and shapes must be the base's, and no other weight file may be there. A classifier's prototypes cannot be
    computed again: without the factors of `include_delta=True` beside it, its head is compared with the fingerprint in the record.
    Raises `MoreError` without a record.
    """
    folder = Path(folder)
    record = Record.read(folder)
    if record.denoiser == ".":
        factors = read_delta(folder / DELTA) if (folder / DELTA).is_file() else {}
        return check_files(folder, record, {space: remap.shift() for space, remap in factors.items()})
    parts = DiffusionPipeline.load_config(folder)
    without = {name: None for name in (record.denoiser, "vae", "safety_checker") if name in parts}
    pipe = DiffusionPipeline.from_pretrained(folder, variant=record.variant, **without)
    return check_files(folder, record, _shifts(pipe, record.request))


def _shifts(pipe: DiffusionPipeline, request: ConceptRequest) -> dict[str, Tensor]:
    """Space -> P̄_t − P_F, `(d, f)`: it depends on neither the solver nor retained names."""
    problems = prepare(pipe, replace(request, retain=()), ())
    return {space: problem.fit("pinv").shift() for space, problem in problems.items()}


def _commit(path: str | None) -> str | None:
    """The commit of a model that was loaded from the Hub, which is a folder's name in its cache."""
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})\b", path or "")
    return found and found[1]
