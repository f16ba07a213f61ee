"""Save an erased model with its record, and load it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils.hub_utils import extract_commit_hash
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

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
from ..diffusion.encoder import Encoder
from ..diffusion.erase import check_in_place
from ..diffusion.erasure import ConceptErasure
from ..diffusion.hook import hooked_modules, make_hooks
from ..diffusion.sites import as_pipeline, find_denoiser
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
from .contents import CARD, DELTA, entries, hashes, is_foreign, sources_of
from .delta import read_delta, read_rewrites, write_delta
from .files import reading, replace_folder, writing
from .layers import pipeline_class, require_importable
from .quantized import check_savable


logger = logging.getLogger(__name__)

# arguments of `from_pretrained` that could run code or open a pickle
UNSAFE = ("trust_remote_code", "custom_pipeline", "use_safetensors")
PACKAGES = ("torch", "diffusers", "transformers")
FOR_THE_HUB = ("revision", "token", "cache_dir", "local_files_only")


class Savable(NamedTuple):
    """An erased model that can be saved."""

    whole: DiffusionPipeline | PreTrainedModel  # the object with `save_pretrained`
    parts: dict[str, nn.Module]  # its models, by the folder that each is written to
    edited: str  # the name of the edited model, as in `Record.denoiser`
    module: nn.Module  # the edited model; two are in an `nn.ModuleDict`
    # the directions that the edit removes from each space, for checking the files; empty if unknown
    removed: dict[str, Removed]
    revision: str | None  # the commit that the edited model was loaded from


def save(
    pipe: DiffusionPipeline | nn.Module,
    folder: str | os.PathLike,
    *,
    include_delta: bool = False,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    processor: PushToHubMixin | None = None,
) -> Path:
    """
    Save an erased model: `save_pretrained` plus `more_hf.json`, the record of the erasure. The model is not
    changed.

    An existing folder is replaced as a whole: at any moment, it is the old one or the new one. The user's own
    files in it are kept, unless they could be loaded as weights.

    Args:
        pipe (`DiffusionPipeline` or `nn.Module`):
            An erased pipeline, or an erased classifier of Transformers.
        folder (`str` or `os.PathLike`):
            The folder to write; neither a mount point nor the working directory.
        include_delta (`bool`, *optional*, defaults to `False`):
            Also write the thin factors, which `load` needs for a router and for a classifier's features:
            without them, its features are the original's. Whoever has them and these weights can compute the
            concept back, so do not publish them.
        variant (`str`, *optional*):
            The variant in the files' names, such as `"fp16"`.
        max_shard_size (`int` or `str`, *optional*):
            The largest weight file, such as `"5GB"`; by default that of `save_pretrained`.
        processor (`PushToHubMixin`, *optional*):
            A classifier's image processor, feature extractor or tokenizer, to be saved and published with it.

    Returns:
        `Path`: the folder.

    Raises:
        `ExportError`: nothing was erased; a component is not what its class expects (a LoRA that is loaded
        but not fused would be lost or break the names); a class of your own could not be opened from its
        module; the weights or the text encoder changed since the erasure; the folder holds something that
        this save does not replace and must not keep (other weights, which could be the original's); or it
        could not be written. The folder is then unchanged.
    """
    folder = Path(folder)
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
        require_importable(type(savable.whole), {type(part) for part in savable.parts.values()})
        for name, part in savable.parts.items():
            check_savable(name, part)
            _require_plain(name, part)

        def write(draft: Path) -> None:
            savable.whole.save_pretrained(draft, variant=variant, **options)
            if processor is not None:
                processor.save_pretrained(draft)
            finish_draft(savable, erasure, draft, variant=variant, include_delta=include_delta)
            refuse_leftovers(folder, draft)

        replace_folder(folder, write)
    return folder


def _savable(pipe: DiffusionPipeline | nn.Module, erasure: Erasure) -> Savable:
    if isinstance(pipe, nn.Module):
        model = savable_classifier(pipe, erasure)
        removed = {space: Removed(remap.shift(), 0.0) for space, remap in erasure.remaps.items()}
        revision = getattr(model.config, "_commit_hash", None)
        return Savable(model, {CLASSIFIER: model}, CLASSIFIER, model, removed, revision)
    pipe = as_pipeline(pipe)
    denoiser = find_denoiser(pipe)
    check_in_place(pipe)
    components = {
        name: unwrap_module(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)
    }
    parts = {
        name: part for name, part in components.items() if isinstance(part, ModelMixin | PreTrainedModel)
    }
    # Computed with the text encoders as they are now, because these are saved and will verify the folder.
    removed = removed_from(Encoder.of(pipe, erasure.request, denoiser), erasure.request, erasure.facts)
    first = next(iter(denoiser.parts.values()))
    revision = extract_commit_hash(f"{first.config.get('_name_or_path')}/")
    return Savable(pipe, parts, denoiser.name, denoiser.module, removed, revision)


def _require_plain(name: str, part: nn.Module) -> None:
    """Raises `ExportError` if a model's tensors are not those of a fresh model of its class."""
    expected, actual = expected_shapes(part), shapes_of(part)
    # A quantizer packs weights, cuts them into tensors whose names begin with theirs, and loads them itself.
    if getattr(part, "hf_quantizer", None) is not None:
        parts = [key.split(".") for key in actual]
        beginnings = {".".join(path[:length]) for path in parts for length in range(1, len(path) + 1)}
        actual = {key: expected[key] for key in beginnings if key in expected}
    keys = sorted(expected.keys() | actual.keys())
    differing = [key for key in keys if expected.get(key) != actual.get(key)]
    if differing:
        raise ExportError(
            f"{len(differing)} tensors of `{name}` are not those of a {type(part).__name__} (first: "
            f"`{differing[0]}`), and `from_pretrained` would drop them or fill others with random numbers. "
            "Is a LoRA or another adapter loaded? Call `pipe.unload_lora_weights()` (fuse it first to keep "
            "it), then save."
        )


def finish_draft(
    savable: Savable, erasure: Erasure, draft: Path, *, variant: str | None, include_delta: bool
) -> None:
    """
    Write the factors if wanted, and the record, next to the saved weights.

    Raises:
        `ExportError`: `verify` would not accept the files.
    """
    if include_delta:
        write_delta(erasure, draft)
    elif erasure.router is not None:
        logger.warning(
            "The %r router is not saved: the files hold the mean expert alone. Pass include_delta=True to "
            "save its factors, too.",
            erasure.router,
        )
    record = make_record(savable, erasure, draft, variant)
    layers = [Layer(name, site.space, list(site.read().shape)) for name, site in erasure.sites.items()]
    verification = check_folder(draft, record, layers, savable.removed)
    if not verification:
        raise ExportError(
            f"The model to be saved is not the erased model ({verification.failures}). Was a LoRA fused, or "
            "the model or its text encoder changed since? Undo that, then save."
        )
    write_text(draft / RECORD, record.to_json())


def make_record(savable: Savable, erasure: Erasure, draft: Path, variant: str | None) -> Record:
    """Make the record of an erasure whose files are in `draft`; its sites must hold the edited weights."""
    sites = {name: site.read() for name, site in erasure.sites.items()}
    record = Record(
        more_hf=__version__,
        versions={"python": python_version(), **{package: version(package) for package in PACKAGES}},
        request=erasure.request,
        sites={name: list(weight.shape) for name, weight in sites.items()},
        guarantees=erasure.guarantees,
        proof=erasure.proof,
        facts=replace(erasure.facts, base_revision=erasure.facts.base_revision or savable.revision),
        denoiser=savable.edited,
        variant=variant,
        layout=layout_of(shapes_of(savable.module)),
        edited=fingerprint(sites),
        sources=sources_of(erasure.facts.base),
        files=hashes(draft, [path for path in entries(draft) if path != Path(CARD)]),
    )
    quantized = any(getattr(part, "hf_quantizer", None) for part in savable.parts.values())
    if record.kind == "classifier" or quantized:
        # Transformers writes some models under the names of earlier versions, and quantizers under names of
        # their own, so read them back.
        record = replace(record, layout=layout_of(read_weights(draft, record).shapes))
    return record


def refuse_leftovers(folder: Path, draft: Path) -> None:
    """Raises `ExportError` if the folder to be replaced holds files that must be neither lost nor kept."""
    written = set(entries(draft))
    others = [path for path in entries(folder) if path not in written and is_foreign(folder, path)]
    if others:
        raise ExportError(
            f"{folder} already holds {', '.join(map(str, others[:5]))}, which this save does not replace and "
            "which could be the original under another name, or factors of an earlier save. Remove it or "
            "choose an empty folder (git history, if any, keeps old files)."
        )


def load(source: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline | nn.Module:
    """
    Load an erased pipeline or classifier with its record, from a folder or Hub repository that `save` wrote.

    `get_erasure` then knows what was erased, and another `erase_concept` says that the originals are needed.
    A router, or a classifier's hook, is restored if the factors are next to the weights; without them, a
    classifier's features are the original's, and only its predictions forget. If the pipeline or a model is
    of a class of your own, import its module first. Record, factors and weights
    come from the same commit, even if somebody pushes meanwhile. `load` runs no code from the repository and
    opens no pickle.

    Args:
        source (`str` or `os.PathLike`):
            A folder, or a repository's name.
        **kwargs:
            Passed on to `from_pretrained` (`dtype`, `revision`, `token`, `cache_dir`, ...).

    Returns:
        The pipeline or classifier.

    Raises:
        `MoreError`: there is no record, or an argument would run code or open a pickle.
        `IncompatibleBaseError`: the record or a file cannot be read, or the weights are not those of the
        record. Errors of the network are the client's.

    Example:

    ```py
    >>> import more_hf

    >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
    >>> folder = more_hf.save(pipe, "emoji-sd-without-blobmoji")
    >>> print(more_hf.get_erasure(more_hf.load(folder)))
    ```
    """
    if unsafe := [key for key in UNSAFE if key in kwargs]:
        raise MoreError(
            f"`load` does not take `{unsafe[0]}`: it runs no code from a repository and opens no pickle. If "
            f"you trust {source}, use `DiffusionPipeline.from_pretrained`."
        )
    folder = Path(source)
    if not folder.is_dir():
        hub = {key: kwargs[key] for key in FOR_THE_HUB if key in kwargs}
        with _found(source):
            folder = Path(snapshot_download(str(source), allow_patterns=[RECORD, DELTA], **hub))
        kwargs["revision"] = folder.name  # the commit
    record = Record.read(folder)
    if (variant := kwargs.pop("variant", record.variant)) != record.variant:
        raise IncompatibleBaseError(
            f"The record in {folder} describes the files of variant {record.variant!r}, not {variant!r}. "
            "Leave `variant` out."
        )
    with _found(source):
        opened = load_classifier if record.kind == "classifier" else _load_pipeline
        return opened(source, folder, record, **kwargs)


@contextmanager
def _found(source: str | os.PathLike) -> Iterator[None]:
    """Inside the block, read a folder or a repository's files. Raises `MoreError` if they are not there."""
    try:
        with reading(source):
            yield
    except LocalEntryNotFoundError as error:
        raise MoreError(
            f"There is no folder {str(source)!r}, and the cache has not all files of a repository of this "
            "name; the Hub was not asked or did not answer. Check the spelling and the connection."
        ) from error


def _load_pipeline(
    source: str | os.PathLike, folder: Path, record: Record, **kwargs: Any
) -> DiffusionPipeline:
    hub = {key: kwargs[key] for key in FOR_THE_HUB if key in kwargs}
    cls = pipeline_class(DiffusionPipeline.load_config(source, **hub)["_class_name"])
    pipe = cls.from_pretrained(source, variant=record.variant, use_safetensors=True, **kwargs)
    denoiser = find_denoiser(pipe)
    sites = edited_sites(pipe, denoiser, record.request, record.facts)
    shapes = {name: list(site.read().shape) for name, site in sites.items()}
    if denoiser.name != record.denoiser or shapes != record.sites:
        raise IncompatibleBaseError(
            f"The record in {folder} describes a model with other layers ({len(record.sites)}; this one has "
            f"{len(shapes)}). Save the erased model again."
        )
    require_saved_weights(folder, record)
    remaps = read_delta(folder)
    request = record.request if remaps else replace(record.request, router=None)
    erasure = ConceptErasure(
        request,
        record.facts,
        sites,
        remaps,
        None,
        record.guarantees,
        record.proof,
        rewrites=read_rewrites(folder),
    )
    erasure.hooks = make_hooks(denoiser, erasure, pipe._execution_device)
    attach_hooks(erasure.hooks, hooked_modules(denoiser))
    register(denoiser.module, erasure)
    return pipe


def refuse_saved_folder(file: Path, reason: str) -> None:
    """
    Raises `ExportError` if a file would be inside a folder that `save` wrote; the reason completes the
    message.
    """
    for folder in file.resolve().parents:
        if (folder / RECORD).is_file():
            raise ExportError(f"{folder} holds an erased model, {reason}. Choose another folder.")
