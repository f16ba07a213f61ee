"""Export the erasure as a LoRA file for diffusers, ComfyUI and A1111."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.functional import pad

from .. import __version__
from ..core.erasure import Erasure
from ..core.errors import AlreadyErasedError, ExportError, IncompatibleBaseError
from ..core.files import replacing
from ..core.registry import require_editable
from ..core.request import ConceptRequest, EncoderBits, read_names, with_options
from ..diffusion.encoder import Encoder
from ..diffusion.erase import check_in_place, erasure_beside, erasure_of_layers, get_erasure
from ..diffusion.erasure import ConceptErasure
from ..diffusion.families import FAMILIES
from ..diffusion.ordinary import encode_ahead
from ..diffusion.sites import Denoiser, find_denoiser
from .files import PICKLES, reading, writing
from .folder import refuse_saved_folder
from .layers import pipeline_class
from .one_file import OpenedFile, open_file
from .shards import Opened, folder_of, open_without_denoiser, refuse_inner_edit, refuse_router
from .single_file import unet_names
from .tensor_file import read_tensor_file


FILE_NAMES = {
    "peft": "pytorch_lora_weights.safetensors",
    "kohya": "pytorch_lora_weights_kohya.safetensors",
    "comfyui": "pytorch_lora_weights_comfyui.safetensors",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The largest ‖B A − ΔW‖ / ‖ΔW‖ of a layer, in units of the dtype's eps. Rounding two balanced factors costs
# about a third of one eps.
TOLERANCE = 4


def save_lora(
    pipe: DiffusionPipeline,
    path: str | os.PathLike,
    *,
    format: str = "peft",
    dtype: torch.dtype = torch.float16,
) -> Path:
    """
    Write the erasure as one LoRA file for the original model. The pipeline is not changed.

    Loaded into the original at weight 1, it gives the erased model up to the rounding of `dtype`: the change
    of an edited layer has the rank of the forget prototypes, so nothing is approximated. Another weight is
    another `strength` of `erase_concept`, times the file's own. Do not load it into a model that is already
    erased.

    For Wan 2.2 there are two files, as diffusers expects: the second, with `_2` at the end of its name, is
    for `load_lora_weights(..., load_into_transformer_2=True)`.

    The file undoes the erasure: whoever has it and the erased weights can subtract it and has the concept
    back. It is meant for people who have the original anyway; keep it out of a repository whose erased
    weights should stay erased.

    Args:
        pipe (`DiffusionPipeline`):
            An erased pipeline whose original weights were kept (`keep_originals=True`).
        path (`str` or `os.PathLike`):
            A file that ends in `.safetensors`, which is replaced if it exists; or a folder, where the file is
            named `pytorch_lora_weights.safetensors` (`peft`, which `load_lora_weights(folder)` finds), or
            with `_kohya` or `_comfyui` at the end of its name (which needs `weight_name=`).
        format (`str`, *optional*, defaults to `"peft"`):
            `"peft"` for diffusers; `"comfyui"` for ComfyUI, with the layers' names in the original checkpoint
            (of other layers than those that read text, for some families only); or `"kohya"` for ComfyUI,
            A1111 and diffusers, which exists for Stable Diffusion 1.x, 2.x and XL only. The names are those
            that ComfyUI's `comfy/lora.py` documents; ComfyUI itself was not run.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`):
            Dtype of the factors: also `torch.bfloat16` or `torch.float32`.

    Returns:
        `Path`: the file, or the first of two.

    Raises:
        `ExportError`: nothing was erased, an argument is wrong, the factors do not fit `dtype`, the file
        would be next to erased weights, it could not be written, or no loader takes such a file for this
        family (`"peft"` for PixArt, `"kohya"` for any but Stable Diffusion 1.x to XL, `"comfyui"` for
        Kolors). `AlreadyErasedError`: the original weights are not available. Nothing is written then.

    Example:

    ```py
    >>> import more_hf

    >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
    >>> file = more_hf.save_lora(pipe, "without_blobmoji", format="kohya")
    >>> original = more_hf.load_emoji_sd()
    >>> original.load_lora_weights(file.parent, weight_name=file.name)
    ```
    """
    path = lora_path(path, format)
    refuse_without_loader(type(pipe), format)
    denoiser, erasure = _find(pipe)
    _refuse_gates(erasure.request)
    return _write(path, pipe, denoiser, erasure, format=format, dtype=dtype)


@with_options
def erase_to_lora(
    source: str | os.PathLike | DiffusionPipeline,
    path: str | os.PathLike,
    concepts: str | Sequence[str] | Mapping[str, Sequence[str]],
    *,
    remap_to: str | Sequence[str] | Mapping[str, str | Sequence[str] | None] | None,
    format: str = "peft",
    dtype: torch.dtype = torch.float16,
    text_encoder: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    quantize_text_encoder: EncoderBits | None = None,
    also_encode: Sequence[str] = (),
    **options: Any,
) -> ConceptErasure:
    """
    Erase concepts from a saved pipeline and write the edit as one LoRA file, without loading the denoiser.

    Only the layers that read text are read from its files, a few among several hundred, so that a model of
    twenty billion parameters needs no more memory than its text encoder. The file is that of `erase_concept`
    and `save_lora`; only the proof by run is missing, and the report says so.

    Args:
        source (`str`, `os.PathLike` or `DiffusionPipeline`):
            The folder of an original pipeline with safetensors files, sharded or not, or a Hub id, which is
            downloaded; or a checkpoint in one file, as in [`erase_file`], in fp8 as well. Or a pipeline in
            memory, which is not changed and may be quantized: load the file into it then. It is as it is, so
            that the arguments after `dtype` have no meaning.
        path, format:
            As in [`save_lora`].
        concepts, remap_to, options:
            As in [`erase_concept`], except `router`, and `reach` unless the source is a pipeline.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`):
            Dtype of the factors; the models are loaded in the dtype in which the denoiser is stored.
        text_encoder (`str` or `os.PathLike`, *optional*):
            As in [`erase_file`], for a checkpoint in one file.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the text encoders run.
        quantize_text_encoder, also_encode:
            As in [`erase_to_folder`].

    Returns:
        `ConceptErasure`: the report; `print` shows it.

    Raises:
        `ExportError`, `SiteNotFoundError` and `PrototypeError`: as from `save_lora` and `erase_concept`.
        `AlreadyErasedError`: the folder was saved erased. `IncompatibleBaseError`: it cannot be read.

    Example:

        >>> import more_hf
        >>> from more_hf.data import FOLDER
        >>> report = more_hf.erase_to_lora(FOLDER / "emoji_sd", "loras", "Blobmoji", remap_to="Fluent")
    """
    path = lora_path(path, format)
    request = ConceptRequest.of(concepts, remap_to=remap_to, **options)
    refuse_router(request, "A LoRA")
    _refuse_gates(request)
    if isinstance(source, DiffusionPipeline):
        refuse_without_loader(type(source), format)
        erasure = erasure_beside(source, request)
        _write(path, source, find_denoiser(source), erasure, format=format, dtype=dtype)
        return erasure
    refuse_inner_edit(request)
    names = read_names("also_encode", also_encode)
    if Path(source).is_file():
        opened = open_file(read_tensor_file(source), text_encoder, device, quantize_text_encoder)
        refuse_without_loader(type(opened.pipe), format)
        return _erase_layers(path, opened, request, names, format, dtype)
    folder = folder_of(source)
    with reading(source):
        pipeline = DiffusionPipeline.load_config(folder)["_class_name"]
    refuse_without_loader(pipeline_class(pipeline), format)
    # The metadata of a kohya file has the size of pictures, which depends on the VAE.
    without = () if format == "kohya" else ("vae",)
    opened = open_without_denoiser(folder, device, without=without, quantize=quantize_text_encoder)
    return _erase_layers(path, opened, request, names, format, dtype)


def _erase_layers(
    path: Path,
    opened: Opened | OpenedFile,
    request: ConceptRequest,
    names: Sequence[str],
    format: str,
    dtype: torch.dtype,
) -> ConceptErasure:
    encoder = Encoder.of(opened.pipe, request, opened.denoiser, opened.kept)
    encode_ahead(encoder, request, names)
    erasure = erasure_of_layers(encoder, request)
    _write(path, opened.pipe, opened.denoiser, erasure, format=format, dtype=dtype)
    return erasure


def _write(
    path: Path,
    pipe: DiffusionPipeline,
    denoiser: Denoiser,
    erasure: Erasure,
    *,
    format: str,
    dtype: torch.dtype,
) -> Path:
    family = denoiser.family
    if format == "kohya" and family.kohya is None:
        named = [other.name for other in FAMILIES.values() if other.kohya is not None]
        raise ExportError(
            f'The layer names of format="kohya" are those of UNets of {" and ".join(named)}, and '
            f'{family.name} has other layers. Pass format="comfyui" for ComfyUI, or "peft" for diffusers.'
        )
    factors = _factors(erasure, dtype)
    metadata = {"format": "pt", "more_hf": json.dumps(_record(erasure))}
    first = next(iter(denoiser.parts))  # loaders expect the first denoiser's name in either file
    files = {}
    for file, prefix in zip(lora_files(path, len(denoiser.parts)), denoiser.prefixes.values(), strict=True):
        own = {name.removeprefix(prefix): pair for name, pair in factors.items() if name.startswith(prefix)}
        if format == "peft":
            files[file] = _peft(own, first)
        elif format == "kohya":
            files[file] = _kohya(own, first, family.kohya)
        else:
            files[file] = _comfyui(own, denoiser)
    if format == "kohya":
        metadata |= _kohya_metadata(pipe, denoiser, erasure)
    with writing(path), ExitStack() as stack:
        drafts = {file: stack.enter_context(replacing(file)) for file in files}
        for file, tensors in files.items():
            # `save_file` would make files that only this user may read
            drafts[file].write_bytes(to_bytes(tensors, metadata=metadata))
    return path


def lora_files(path: Path, denoisers: int) -> list[Path]:
    """The file of each denoiser."""
    return [path, *(path.with_stem(f"{path.stem}_{i}") for i in range(2, denoisers + 1))]


def lora_path(path: str | os.PathLike, format: str) -> Path:
    """
    The file that `save_lora` writes.

    Raises:
        `ExportError`: the format is unknown, or the file would be a pickle or next to erased weights.
    """
    if not isinstance(format, str) or format not in FILE_NAMES:
        raise ExportError(f"Unknown format {format!r}. Choose one of {', '.join(map(repr, FILE_NAMES))}.")
    path = Path(path)
    if path.suffix in PICKLES:
        raise ExportError(f"{path} would be a pickle. Give a name that ends in .safetensors, or a folder.")
    if path.suffix != ".safetensors":
        path /= FILE_NAMES[format]
    refuse_saved_folder(path, "from which a LoRA next to it gets the concept back")
    return path


def refuse_without_loader(pipeline: type[DiffusionPipeline], format: str) -> None:
    """Raises `ExportError` for a pipeline class into which diffusers loads no LoRA, which ComfyUI may do."""
    if format != "comfyui" and not hasattr(pipeline, "load_lora_weights"):
        raise ExportError(
            f"diffusers loads no LoRA into a {pipeline.__name__} (it has no `load_lora_weights`), so nothing "
            'could read the file. Pass format="comfyui" for ComfyUI, or save the erased weights with '
            "`more_hf.save`."
        )


def _refuse_gates(request: ConceptRequest) -> None:
    """Raises `ExportError` for gates, which have thresholds."""
    if request.gated:
        raise ExportError(
            f"`reach={request.reach!r}` changes biases, which hold the gates' thresholds, and a LoRA has "
            "none. Erase from a pipeline and save it with `more_hf.save`, or pass another `reach`."
        )


def _find(pipe: DiffusionPipeline) -> tuple[Denoiser, Erasure]:
    denoiser = find_denoiser(pipe)
    # `require_editable` refuses a copy of an erased model.
    erasure = get_erasure(pipe) or require_editable(denoiser.module)
    if erasure is None:
        raise ExportError(
            "Nothing was erased from this pipeline, so there is no LoRA of it. Call `more_hf.erase_concept` "
            "first."
        )
    if erasure.originals is None:
        raise AlreadyErasedError(
            "A LoRA is relative to the original weights, which this pipeline without "
            f"{', '.join(map(repr, erasure.concepts))} no longer has. Load "
            f"{erasure.facts.base or 'the original model'}, erase there with keep_originals=True, and export "
            "that."
        )
    check_in_place(pipe)
    return denoiser, erasure


def _factors(erasure: Erasure, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """
    Layer -> `lora_A` `(rank, in_features)` and `lora_B` `(out_features, rank)` in `dtype`, on the CPU; for a
    1×1 convolution, both with two more axes of 1.
    """
    if dtype not in DTYPES:
        raise ExportError(
            f"A LoRA cannot be written in {dtype}. Choose one of {', '.join(map(str, DTYPES))}."
        )
    factors, limit = {}, TOLERANCE * torch.finfo(dtype).eps
    for name, weight in erasure.originals.items():
        if not torch.isfinite(weight).all():
            raise IncompatibleBaseError(
                f"The original weight of `{name}` is not finite, so its file is damaged. Save or download it "
                "again."
            )
        # 1. The edit's own factors, with zeros for columns that do not read text.
        lora_A, lora_B = erasure.remap_of(name).delta(weight)
        site = erasure.sites[name]
        lora_A = pad(lora_A, (0, site.width - weight.shape[1]))
        # 2. Balanced, they can be rounded.
        rounded_A, rounded_B = (factor.to(dtype) for factor in _balance(lora_A, lora_B, erasure.rank))
        # 3. Check the product of the rounded factors.
        delta = lora_B @ lora_A
        size = float(delta.norm())
        error = float((rounded_B.double() @ rounded_A.double() - delta).norm())
        if not error <= limit * size:
            remedy = (
                "The layer's weights are out of its range: save them with `more_hf.save` instead"
                if dtype is torch.float32
                else "Pass dtype=torch.float32"
            )
            raise ExportError(
                f"The change of `{name}`, of size {size:.1e}, does not fit {dtype}: it would be wrong by "
                f"{error:.1e}, more than {limit:.1e} of it. {remedy}."
            )
        if isinstance(site.module, nn.Conv2d):
            rounded_A, rounded_B = rounded_A[..., None, None], rounded_B[..., None, None]
        factors[name] = rounded_A, rounded_B
    return factors


def _balance(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """
    Factors with the same product and with orthogonal terms of evenly split size: row i of A and column i of B
    both have the norm √(singular value). Zeros fill them up to `rank`.

    The terms of `Remap.delta` partly cancel, above all for several concepts, so rounding those factors to
    half precision would lose what these keep.
    """
    Q_A, R_A = torch.linalg.qr(lora_A.T)
    Q_B, R_B = torch.linalg.qr(lora_B)
    left, sizes, right = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    balanced_A, balanced_B = ((Q_A @ right.T) * sizes.sqrt()).T, (Q_B @ left) * sizes.sqrt()
    # Layers with fewer prototypes, or narrower ones, still need the file's common rank.
    missing = rank - len(sizes)
    return pad(balanced_A, (0, 0, 0, missing)).contiguous(), pad(balanced_B, (0, missing)).contiguous()


def _peft(factors: dict[str, tuple[Tensor, Tensor]], component: str) -> dict[str, Tensor]:
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        tensors[f"{component}.{name}.lora_A.weight"] = lora_A
        tensors[f"{component}.{name}.lora_B.weight"] = lora_B
    return tensors


def _kohya(
    factors: dict[str, tuple[Tensor, Tensor]], component: str, names: Mapping[str, str]
) -> dict[str, Tensor]:
    renamed = {names.get(name, name): pair for name, pair in factors.items()}
    tensors = convert_state_dict_to_kohya(_peft(renamed, component))
    # diffusers writes the alphas as integers, but tools expect floats, as kohya's trainer writes them.
    return {name: tensor.float() if name.endswith(".alpha") else tensor for name, tensor in tensors.items()}


def _comfyui(factors: dict[str, tuple[Tensor, Tensor]], denoiser: Denoiser) -> dict[str, Tensor]:
    """What ComfyUI reads for any model: its own parameters' names, those of the original checkpoint."""
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        key = f"diffusion_model.{original_name(denoiser, name)}"
        tensors[f"{key}.lora_up.weight"] = lora_B
        tensors[f"{key}.lora_down.weight"] = lora_A
        tensors[f"{key}.alpha"] = torch.tensor(float(len(lora_A)))  # scales by alpha / rank
    return tensors


def original_name(denoiser: Denoiser, layer: str) -> str:
    """
    A layer's name in ComfyUI's model of this family.

    Raises:
        `ExportError`: ComfyUI has no such model, or this package does not know its name of the layer.
    """
    family, name = denoiser.family, f"{layer}.weight"
    starts = family.original
    if family.kohya is not None:
        starts = unet_names(denoiser.module) | {f"{old}.": f"{new}." for old, new in family.kohya.items()}
    for start, original in starts.items():
        if name.startswith(start):
            return (original + name.removeprefix(start)).removesuffix(".weight")
    known = (
        f"knows only {', '.join(start.rstrip('.') for start in starts)}" if starts else "has no such model"
    )
    raise ExportError(
        f'`{layer}` of {family.name} has no name in format="comfyui", which {known}. Pass format="peft".'
    )


def _record(erasure: Erasure) -> dict:
    facts = erasure.facts
    return {
        "more_hf": __version__,
        "request": erasure.request.to_dict(),
        "solver": facts.solver,
        "rank": facts.rank,
        "num_experts": facts.num_experts,
        "base": facts.base,
        "fingerprint": facts.fingerprint,
    }


def _kohya_metadata(pipe: DiffusionPipeline, denoiser: Denoiser, erasure: Erasure) -> dict[str, str]:
    """The metadata that A1111 and ComfyUI show, by the names of kohya's trainer and of modelspec."""
    config, rank = denoiser.module.config, str(erasure.rank)
    v_prediction = pipe.scheduler.config.get("prediction_type") == "v_prediction"
    if denoiser.family.pooled:
        version, architecture = "sdxl_base_v1-0", "xl-v1-base"
    elif config.use_linear_projection:
        version, architecture = "sd_v2", "v2-768-v" if v_prediction else "v2-512"
    else:
        version, architecture = "sd_v1", "v1"
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    title = f"Without {', '.join(erasure.concepts)}"
    return {
        "ss_output_name": re.sub(r"\W+", "_", title),  # the alias in A1111's <lora:ALIAS:1>
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "ss_sd_model_name": erasure.facts.base,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{width * pipe.vae_scale_factor}x{height * pipe.vae_scale_factor}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "modelspec.usage_hint": f"Weight {1 / erasure.request.strength:.3g} on the original model erases, "
        "0 does not. Not for a model that is erased already.",
    }
