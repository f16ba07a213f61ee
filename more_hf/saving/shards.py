"""Erase from a saved pipeline by loading only the layers that read text, a few among several hundred."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..core.errors import ExportError, IncompatibleBaseError, PrototypeError
from ..core.install import edited_weights
from ..core.record import refuse_erased_source
from ..core.request import ENCODER_BITS, ConceptRequest, EncoderBits, check_choice, read_names, with_options
from ..core.site import write_weights
from ..diffusion.encoder import Encoder
from ..diffusion.erase import erasure_of_layers
from ..diffusion.erasure import ConceptErasure
from ..diffusion.families import denoiser_names
from ..diffusion.kept import KeptFeatures
from ..diffusion.ordinary import encode_ahead
from ..diffusion.sites import Denoiser, find_denoiser, find_sites
from .check import removed_from
from .contents import INDEX, MODEL_INDEX, entries, is_loadable, variant_of
from .files import reading, replace_folder, writing
from .folder import Savable, finish_draft, refuse_leftovers
from .layers import pipeline_class, read_denoiser, read_index, read_tensors
from .tensor_file import bytes_of, read_tensor_file


# components that an edit does not need
UNUSED = ("safety_checker", "image_encoder", "feature_extractor")
# The class names of components without weights match this.
WEIGHTLESS = re.compile(r"Tokenizer|Processor|FeatureExtractor|Scheduler$|Guidance$")
PIECE = 4096  # bytes of each tensor that tell one file of weights from another
CONFIGS = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # what else a component's folder holds


class Opened(NamedTuple):
    """A saved pipeline whose denoiser was left on the disk."""

    folder: Path
    pipe: DiffusionPipeline  # the other components that are needed
    denoiser: Denoiser  # on the meta device except for the layers that read text
    kept: KeptFeatures | None  # what stands for the text encoders, if they were left on the disk, too


def open_without_denoiser(
    source: str | os.PathLike,
    device: torch.device | str,
    *,
    without: Sequence[str] = (),
    quantize: EncoderBits | None = None,
) -> Opened:
    """
    Open a saved original without its denoiser, in the dtype in which that is stored: a folder with
    safetensors files, or a Hub id, which is downloaded. The text encoders run on the device; components that
    are not needed, besides `UNUSED`, are left out by `without`; `quantize` is as in `pipeline_around`.

    Raises:
        `SiteNotFoundError`: the denoiser's family is not supported. `AlreadyErasedError`: the pipeline was
        saved erased. `IncompatibleBaseError`: it cannot be read.
    """
    folder = folder_of(source)
    cls, parts = read_index(folder)

    # 1. Build the denoisers with no weights except those of the layers that read text.
    denoisers = {}
    for name in denoiser_names(cls, parts):
        files = [folder / path for path in _weights_of(folder, name)]
        denoisers[name] = read_denoiser(folder, name, partial(read_tensors, files), layers=True).module

    # 2. Load the rest.
    stored = next(p.dtype for p in next(iter(denoisers.values())).parameters() if not p.is_meta)
    weights = digest_of(dict.fromkeys(encoder_files(folder), ""))
    pipe, denoiser, kept = pipeline_around(
        folder, denoisers, stored, device, dict.fromkeys(without), quantize, weights=weights
    )
    refuse_erased_source(str(folder), lambda record: find_sites(pipe, denoiser, pooled=record.request.pooled))
    return Opened(folder, pipe, denoiser, kept)


def pipeline_around(
    folder: Path,
    denoisers: Mapping[str, nn.Module],
    dtype: torch.dtype,
    device: torch.device | str,
    given: Mapping[str, Any],
    quantize: EncoderBits | None = None,
    *,
    held: Callable[[], Mapping[str, nn.Module]] = dict,
    weights: str | None = None,
) -> tuple[DiffusionPipeline, Denoiser, KeptFeatures | None]:
    """
    A saved pipeline around denoisers, by component, that are on the meta device, and these as one. The other
    components go to the device in `dtype`.

    Components that are `given` are not loaded from the folder; `None` leaves one out, as all of `UNUSED` are.
    `quantize` says how bitsandbytes quantizes the text encoders that are, and `held` loads those that are not
    in the folder. The `weights` tell the text encoders' weights from others: they are loaded only for prompts
    whose features are not kept, and stand-ins on the meta device take their place until then; by default they
    are loaded now.

    Raises:
        `SiteNotFoundError`: as from `find_denoiser`. `IncompatibleBaseError`: a component cannot be read.
    """
    cls, parts = read_index(folder)
    others = {name: part for name, part in {**dict.fromkeys(UNUSED), **given}.items() if name in parts}
    if "safety_checker" in others:
        others["requires_safety_checker"] = False
    encoders = [name for name in parts if name.startswith("text_encoder")]

    def load(more: Mapping[str, Any]) -> DiffusionPipeline:
        options = {**others, **denoisers, **more}
        if quantize is not None and (own := [name for name in encoders if name not in options]):
            options["quantization_config"] = _quantization(quantize, own, dtype)
        # Some pipelines look at their denoiser on creation, but none can be moved with it.
        with reading(folder):
            pipe = pipeline_class(cls).from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
        pipe.register_modules(**dict.fromkeys(denoisers))
        return pipe

    stand_ins = {} if weights is None else _stand_ins(folder, {name: parts[name] for name in encoders}, dtype)
    if not stand_ins:
        pipe = load(held()).to(device)
        return pipe, find_denoiser(pipe, denoisers), None

    def load_encoders() -> dict[str, nn.Module]:
        loaded = load(held()).to(device)
        return {name: loaded.components[name] for name in encoders}

    pipe, device = load(stand_ins), torch.device(device)
    configs = [part.config.to_json_string() for part in stand_ins.values()]
    source = json.dumps([weights, *configs, str(dtype), quantize, device.type])
    kept = KeptFeatures(source, load_encoders, device)
    return pipe, find_denoiser(pipe, denoisers), kept


def _stand_ins(folder: Path, encoders: Mapping[str, str], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Text encoders without weights, by component; none at all if transformers does not have one's class."""
    found = {}
    with reading(folder):
        for name, cls in encoders.items():
            if not hasattr(transformers, cls):
                return {}
            model = getattr(transformers, cls)
            with init_empty_weights():
                found[name] = model(model.config_class.from_pretrained(folder / name)).to(dtype)
    return found


def encoder_files(folder: Path) -> list[Path]:
    """The weight files of a pipeline's text encoders."""
    parts = read_index(folder)[1]
    encoders = [name for name in parts if name.startswith("text_encoder")]
    return [folder / path for name in encoders for path in _weights_of(folder, name)]


def digest_of(files: Mapping[Path, str | tuple[str, ...]]) -> str:
    """
    What tells weights from others without reading them all: of each tensor in these files whose name starts
    so, its type, its shape and a piece out of its middle; and when the file was written.
    """
    digest = hashlib.sha256()
    for path, start in files.items():
        digest.update(f"{path.name} {path.stat().st_mtime_ns}".encode())
        stored = read_tensor_file(path).tensors
        with path.open("rb") as file:
            for name in sorted(filter(lambda name: name.startswith(start), stored)):
                dtype, shape, begin, stop = stored[name]
                digest.update(f"{name} {dtype} {shape}".encode())
                file.seek(max(begin, (begin + stop - PIECE) // 2))
                digest.update(file.read(min(PIECE, stop - begin)))
    return digest.hexdigest()


def _quantization(
    bits: EncoderBits, encoders: Sequence[str], dtype: torch.dtype
) -> PipelineQuantizationConfig:
    """
    What quantizes the text encoders while they are loaded.

    Raises:
        `PrototypeError`: bitsandbytes is not installed, or the choice is unknown.
    """
    check_choice("quantize_text_encoder", bits, ENCODER_BITS)
    if not is_bitsandbytes_available():
        raise PrototypeError(
            f"`quantize_text_encoder={bits!r}` needs bitsandbytes, which is not installed. Install it with "
            "`pip install bitsandbytes`, or leave the argument out."
        )
    config = BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(encoders, config))


def folder_of(source: str | os.PathLike) -> Path:
    """The folder itself, or the folder to which a Hub id is downloaded."""
    folder = Path(source)
    with reading(source):
        return folder if folder.is_dir() else Path(DiffusionPipeline.download(str(source)))


def refuse_inner_edit(request: ConceptRequest) -> None:
    """Raises `PrototypeError` for a request that needs pictures, which only a denoiser draws."""
    if request.inside:
        raise PrototypeError(
            f"`reach={request.reach!r}` draws pictures with the denoiser, which is not loaded here. Leave it "
            "out, or load the pipeline and call `more_hf.erase_concept`."
        )


def refuse_router(request: ConceptRequest, what: str) -> None:
    """Raises `ExportError` for a request with a router, of which one file has no place for the factors."""
    if request.router is not None:
        raise ExportError(
            f"{what} holds the mean expert alone, so `router={request.router!r}` would be lost. Leave it "
            "out, or write a folder with `more_hf.erase_to_folder(..., include_delta=True)`."
        )


@with_options
def erase_to_folder(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    concepts: str | Sequence[str] | Mapping[str, Sequence[str]],
    *,
    remap_to: str | Sequence[str] | Mapping[str, str | Sequence[str] | None] | None,
    include_delta: bool = False,
    device: torch.device | str = "cpu",
    quantize_text_encoder: EncoderBits | None = None,
    also_encode: Sequence[str] = (),
    **options: Any,
) -> ConceptErasure:
    """
    Erase concepts from a saved pipeline into another folder, without loading the denoiser.

    The files are copied, and the edited layers are overwritten in the copies. The result is that of
    `erase_concept` and `save`, with the original's shards. Only the proof by run is missing, and the report
    says so. What the text encoders make of names is kept in the cache (`more_hf` in `HF_HOME`), and they are
    loaded only for names that are not there.

    Args:
        source (`str` or `os.PathLike`):
            The folder of an original pipeline with safetensors files, sharded or not, or a Hub id, which is
            downloaded.
        folder, include_delta:
            As in [`save`].
        concepts, remap_to, options:
            As in [`erase_concept`], except `reach`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the text encoders run.
        quantize_text_encoder (`"8bit"` or `"4bit"`, *optional*):
            Load the text encoders quantized by bitsandbytes, in a half or a quarter of the memory. Their
            features are a little off those of the whole ones, and so is the edit; the report says so.
        also_encode (`Sequence[str]`, *optional*):
            Further names, of which nothing is changed: the text encoders read them now, so that they need not
            be loaded for a later call that forgets, targets or retains them.

    Returns:
        `ConceptErasure`: the report; `print` shows it.

    Raises:
        `ExportError`, `SiteNotFoundError` and `PrototypeError`: as from `save` and `erase_concept`.
        `AlreadyErasedError`: the source was saved erased. `IncompatibleBaseError`: it cannot be read, or a
        component has no safetensors files. The folder is then unchanged.

    Example:

        >>> import more_hf
        >>> from more_hf.data import FOLDER
        >>> report = more_hf.erase_to_folder(FOLDER / "emoji_sd", "erased", "Blobmoji", remap_to="Fluent")
        >>> assert more_hf.verify("erased")
    """
    folder = Path(folder)
    request = ConceptRequest.of(concepts, remap_to=remap_to, **options)
    refuse_inner_edit(request)
    opened = open_without_denoiser(source, device, without=("vae",), quantize=quantize_text_encoder)
    pipe, denoiser = opened.pipe, opened.denoiser
    encoder = Encoder.of(pipe, request, denoiser, opened.kept)
    encode_ahead(encoder, request, read_names("also_encode", also_encode))
    erasure = erasure_of_layers(encoder, request)
    write_weights(erasure.sites, edited_weights(erasure))
    removed = removed_from(encoder, request, erasure.facts)
    savable = Savable(pipe, denoiser.parts, denoiser.name, denoiser.module, removed, revision=None)

    def write(draft: Path) -> None:
        for path in _files_of(opened.folder):
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(opened.folder / path, draft / path)
        for component, prefix in denoiser.prefixes.items():
            edited = {}
            for name, site in erasure.sites.items():
                if name.startswith(prefix):
                    edited[f"{name.removeprefix(prefix)}.weight"] = site.module.weight.detach()
            for path in _weights_of(draft, component):
                overwrite_tensors(draft / path, edited)
        finish_draft(savable, erasure, draft, variant=None, include_delta=include_delta)
        refuse_leftovers(folder, draft)

    with writing(folder):
        replace_folder(folder, write)
    return erasure


def _files_of(folder: Path) -> list[Path]:
    """
    The files of a pipeline that its copy needs: each component's weights without a variant, and its texts.

    Raises:
        `IncompatibleBaseError`: a component's weights are missing, or are both a single file and shards.
    """
    files = [Path(MODEL_INDEX)]
    for component, cls in read_index(folder)[1].items():
        weights = _weights_of(folder, component)
        shards = [path for path in weights if "-of-" in path.name]
        if len(shards) not in (0, len(weights)) or not (weights or WEIGHTLESS.search(cls)):
            raise IncompatibleBaseError(
                f"{folder / component} has no safetensors files, or both a single file and shards. "
                "Save the original again with `save_pretrained`, which writes one kind."
            )
        files += weights
        for path in entries(folder / component):
            index = bool(shards) and INDEX.fullmatch(path.name)
            if index or path.suffix in CONFIGS and not is_loadable(path):
                files.append(component / path)
    return files


def _weights_of(folder: Path, component: str) -> list[Path]:
    """A component's weight files without a variant, relative to the folder."""
    files = [path for path in entries(folder / component) if path.suffix == ".safetensors"]
    return [component / path for path in files if variant_of(str(path)) == ""]


def overwrite_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """
    Overwrite tensors inside a safetensors file without reading the rest. Tensors that the file does not have
    are skipped; the others must have the shape and dtype that they have there.
    """
    stored = read_tensor_file(path).tensors
    with path.open("r+b") as file:
        for name in stored.keys() & tensors.keys():
            file.seek(stored[name].start)
            file.write(bytes_of(tensors[name]))
