"""Save an erased model with its record, and load it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils.hub_utils import extract_commit_hash
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from .. import __version__
from ..api import get_erasure
from ..core.erasure import Erasure
from ..core.errors import ExportError, IncompatibleBaseError, MoreError
from ..core.files import write_text
from ..core.hook import attach_hooks
from ..core.record import CLASSIFIER, RECORD, VARIANT, Record
from ..core.registry import register
from ..core.remap import Removed
from ..core.site import fingerprint
from ..diffusion.activations import edited_sites
from ..diffusion.erase import check_in_place
from ..diffusion.erasure import ConceptErasure
from ..diffusion.hook import hooked_modules, make_hooks
from ..diffusion.sites import find_denoiser
from .check import (
    Layer,
    check_folder,
    expected_shapes,
    layout_of,
    read_weights,
    removed_from,
    require_saved_weights,
    shapes_of,
)
from .classifier import load_classifier, savable_classifier
from .contents import DELTA, entries, is_aside, survey
from .delta import read_delta, write_delta
from .files import path_of, reading, replace_folder, writing


class Savable(NamedTuple):
    """
    What is saved of an erased model.

    Args:
        whole (`DiffusionPipeline` or `PreTrainedModel`):
            What has `save_pretrained`.
        parts (`dict[str, nn.Module]`):
            Its models, by the folder that each is written to.
        edited (`str`):
            Which of them was edited, as `Record.denoiser` has it.
        module (`nn.Module`):
            That one; two in an `nn.ModuleDict`.
        removed (`dict[str, Removed]`):
            What the edit removes from each space, by which the files are checked; empty if not known.
        revision (`str`, *optional*):
            The commit that the edited one was loaded from.
    """

    whole: DiffusionPipeline | PreTrainedModel
    parts: dict[str, nn.Module]
    edited: str
    module: nn.Module
    removed: dict[str, Removed]
    revision: str | None


def save(
    pipe: DiffusionPipeline | nn.Module,
    folder: str | os.PathLike,
    *,
    include_delta: bool = False,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """
    Save an erased model: `save_pretrained` plus `more_hf.json`, the record of what was done. The model is not
    changed.

    A folder that exists is replaced as a whole: whatever happens meanwhile, it is the old one or the new one.
    Texts (`README.md`), pictures, configurations and git's files in it stay.

    Args:
        pipe (`DiffusionPipeline` or `nn.Module`):
            An erased pipeline, or an erased classifier of Transformers.
        folder (`str` or `os.PathLike`):
            Where to; it can be neither a mount point nor the working directory.
        include_delta (`bool`, *optional*, defaults to `False`):
            Also write the thin factors, which `load` needs for a router, and for the features of a
            classifier: without them its features are the original's. Whoever has them and these weights can
            compute the concept back; keep them out of what you publish.
        variant (`str`, *optional*):
            Of the files' names, such as `"fp16"`.
        max_shard_size (`int` or `str`, *optional*):
            Of a weight file, such as `"5GB"`; `save_pretrained`'s by default.

    Returns:
        `Path`: the folder.

    Raises:
        `ExportError`: nothing was erased, a component is not what its class expects (a LoRA is loaded but not
        fused: its weights would be lost or break the names), the weights or the text encoder changed since
        the erasure, the folder holds something that this save neither replaces nor may keep (other weights,
        which could be the original's), or it could not be written. The folder is unchanged then.
    """
    folder = path_of("folder", folder)
    if variant is not None and not (isinstance(variant, str) and VARIANT.fullmatch(variant)):
        raise ExportError(f"`variant` must be letters, digits, - and _, such as 'fp16', got {variant!r}.")
    erasure = get_erasure(pipe)
    if erasure is None:
        raise ExportError(
            f"Nothing was erased from this {type(pipe).__name__}. Call `more_hf.erase_concept` or "
            "`more_hf.erase_classes` first, or use its `save_pretrained`."
        )
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with writing(folder):
        savable = _savable(pipe, erasure)
        for name, part in savable.parts.items():
            _require_plain(name, part)

        def write(draft: Path) -> None:
            savable.whole.save_pretrained(draft, variant=variant, **options)
            record = make_record(savable, erasure, draft, variant)
            write_text(draft / RECORD, record.to_json())
            if include_delta:
                write_delta(erasure, draft)
            check_draft(draft, record, erasure, savable.removed)
            refuse_leftovers(folder, draft)

        replace_folder(folder, write)
    return folder


def _savable(pipe: DiffusionPipeline | nn.Module, erasure: Erasure) -> Savable:
    if isinstance(pipe, nn.Module):
        model = savable_classifier(pipe, erasure)
        removed = {space: Removed(remap.shift(), 0.0) for space, remap in erasure.remaps.items()}
        revision = getattr(model.config, "_commit_hash", None)
        return Savable(model, {CLASSIFIER: model}, CLASSIFIER, model, removed, revision)
    denoiser = find_denoiser(pipe)
    check_in_place(pipe)
    components = {
        name: unwrap_module(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)
    }
    parts = {
        name: part for name, part in components.items() if isinstance(part, ModelMixin | PreTrainedModel)
    }
    # By the text encoders as they are now: they are saved, and whoever verifies has no others.
    removed = removed_from(pipe, erasure.request, erasure.facts)
    first = next(iter(denoiser.parts.values()))
    revision = extract_commit_hash(f"{first.config.get('_name_or_path')}/")
    return Savable(pipe, parts, denoiser.name, denoiser.module, removed, revision)


def _require_plain(name: str, part: nn.Module) -> None:
    """Raises `ExportError` if the tensors of a model are not those that a fresh one of its class has."""
    expected, own = expected_shapes(part), shapes_of(part)
    # A quantizer packs weights and adds tensors, and loads them itself.
    if getattr(part, "hf_quantizer", None) is not None:
        own = {key: expected[key] for key in own if key in expected}
    differing = [key for key in sorted(expected.keys() | own.keys()) if expected.get(key) != own.get(key)]
    if differing:
        raise ExportError(
            f"{len(differing)} tensors of `{name}` are not those of a {type(part).__name__} (first: "
            f"`{differing[0]}`), and `from_pretrained` would drop them or fill others with random numbers. "
            "Is a LoRA or another adapter loaded? Call `pipe.unload_lora_weights()` (fuse it first to keep "
            "it), then save."
        )


def make_record(savable: Savable, erasure: Erasure, draft: Path, variant: str | None) -> Record:
    """The record of an erasure whose edited weights are in its sites."""
    sites = {name: site.read() for name, site in erasure.sites.items()}
    record = Record(
        more_hf=__version__,
        versions={package: version(package) for package in ("torch", "diffusers", "transformers")},
        request=erasure.request,
        sites={name: list(weight.shape) for name, weight in sites.items()},
        guarantees=erasure.guarantees,
        proof=erasure.proof,
        facts=replace(erasure.facts, base_revision=erasure.facts.base_revision or savable.revision),
        denoiser=savable.edited,
        variant=variant,
        layout=layout_of(shapes_of(savable.module)),
        edited=fingerprint(sites),
    )
    if record.kind == "classifier":  # Transformers writes some models under names of its earlier versions
        record = replace(record, layout=layout_of(read_weights(draft, record, survey(draft, record)).shapes))
    return record


def check_draft(draft: Path, record: Record, erasure: Erasure, removed: Mapping[str, Removed]) -> None:
    """Raises `ExportError` unless `verify` will accept what was written."""
    layers = [Layer(name, site.space, list(site.read().shape)) for name, site in erasure.sites.items()]
    verification = check_folder(draft, record, survey(draft, record), layers, removed)
    if not verification:
        raise ExportError(
            f"What would be saved is not the erased model ({verification.failures}). Was a LoRA fused, or "
            "the model or its text encoder changed since? Undo that, then save."
        )


def refuse_leftovers(folder: Path, draft: Path) -> None:
    """Raises `ExportError` if the folder to be replaced holds what must neither be lost nor stay."""
    written = set(entries(draft))
    others = [path for path in entries(folder) if path not in written and not is_aside(folder, path)]
    if others:
        raise ExportError(
            f"{folder} already holds {', '.join(map(str, others[:5]))}, which this save does not replace: it "
            "could be the original under another name, or factors of an earlier save. Remove it or choose "
            "an empty folder (git history, if any, keeps old files)."
        )


def load(source: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline | nn.Module:
    """
    Load an erased pipeline or classifier with its record, from a folder that `save` wrote or such a Hub
    repository.

    `get_erasure` then knows what was erased, and a further `erase_concept` says that the originals are
    needed. A router, or a classifier's hook, is put back if the factors are next to the weights; without them
    a classifier's features are the original's, and only its predictions forget. Record, factors and weights
    come from one commit, even if the repository is pushed to meanwhile. No code from the repository runs, and
    no pickle is opened.

    Args:
        source (`str` or `os.PathLike`):
            A folder, or a repository's name.
        **kwargs:
            Passed on to `from_pretrained` (`dtype`, `revision`, `token`, `cache_dir`, ...).

    Returns:
        The pipeline or classifier.

    Raises:
        `MoreError`: there is no record, or an argument would run code or open a pickle.
        `IncompatibleBaseError`: the record or a file cannot be read, or the weights are not those that the
        record was written for. Errors of the network are the client's.

    Example:

    ```py
    >>> import more_hf

    >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
    >>> folder = more_hf.save(pipe, "emoji-sd-without-blobmoji")
    >>> print(more_hf.get_erasure(more_hf.load(folder)))
    ```
    """
    if unsafe := [
        key for key in ("trust_remote_code", "custom_pipeline", "use_safetensors") if key in kwargs
    ]:
        raise MoreError(
            f"`load` does not take `{unsafe[0]}`: it runs no code of a repository and opens no pickle. If "
            f"you trust {source}, use `DiffusionPipeline.from_pretrained`."
        )
    folder = path_of("source", source)
    if not folder.is_dir():
        hub = {
            key: kwargs[key]
            for key in ("revision", "token", "cache_dir", "local_files_only")
            if key in kwargs
        }
        with reading(source):
            folder = Path(snapshot_download(str(source), allow_patterns=[RECORD, DELTA], **hub))
        kwargs["revision"] = folder.name  # the commit
    record = Record.read(folder)
    if (variant := kwargs.pop("variant", record.variant)) != record.variant:
        raise IncompatibleBaseError(
            f"The record in {folder} is of the files of variant {record.variant!r}, not {variant!r}. Leave "
            "`variant` out."
        )
    with reading(source):
        opened = load_classifier if record.kind == "classifier" else _load_pipeline
        return opened(source, folder, record, **kwargs)


def _load_pipeline(
    source: str | os.PathLike, folder: Path, record: Record, **kwargs: Any
) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(source, variant=record.variant, use_safetensors=True, **kwargs)
    denoiser = find_denoiser(pipe)
    sites = edited_sites(pipe, denoiser, record.request, record.facts)
    shapes = {name: list(site.read().shape) for name, site in sites.items()}
    if denoiser.name != record.denoiser or shapes != record.sites:
        raise IncompatibleBaseError(
            f"The record in {folder} is of a model with other layers ({len(record.sites)}, here "
            f"{len(shapes)}). Save the erased model again."
        )
    require_saved_weights(folder, record)
    erasure = ConceptErasure(
        record.request, record.facts, sites, read_delta(folder), None, record.guarantees, record.proof
    )
    erasure.hooks = make_hooks(denoiser, erasure, pipe._execution_device)
    attach_hooks(erasure.hooks, hooked_modules(denoiser))
    register(denoiser.module, erasure)
    return pipe


def refuse_saved_folder(file: Path, reason: str) -> None:
    """
    Raises `ExportError` if a file would lie in a folder that `save` wrote; the reason completes the message.
    """
    for folder in file.resolve().parents:
        if (folder / RECORD).is_file():
            raise ExportError(f"{folder} holds an erased model, {reason}. Choose another folder.")
