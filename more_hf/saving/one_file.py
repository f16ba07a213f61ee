"""Erase from a checkpoint in one file, of which only the layers that read text are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, GGUFQuantizationConfig
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, LDM_VAE_KEYS
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ..core.claims import check_of
from ..core.errors import AlreadyErasedError, ExportError, IncompatibleBaseError
from ..core.facts import ConceptFacts
from ..core.install import edited_weights
from ..core.record import check_type, read_fields
from ..core.registry import register
from ..core.request import ConceptRequest, EncoderBits, read_names, with_options
from ..core.site import EDITABLE, fingerprint, write_weights
from ..data import FOLDER
from ..diffusion.encoder import Encoder
from ..diffusion.erase import erasure_of_layers
from ..diffusion.erasure import ConceptErasure
from ..diffusion.families import denoiser_names
from ..diffusion.kept import KeptFeatures
from ..diffusion.ordinary import encode_ahead
from ..diffusion.sites import Denoiser, find_layers, find_sites
from .check import Check, Layer, Verification, refuse_weak, remapped, removed_from
from .files import reading
from .folder import refuse_saved_folder
from .layers import read_denoiser, read_index
from .original import bare_names, origins, recognized
from .shards import digest_of, encoder_files, pipeline_around, refuse_inner_edit, refuse_router
from .tensor_file import FP8, TensorFile, note_of, read_tensor_file


# what is downloaded of a model on the Hub: configurations, tokenizers and text encoders
NEEDED = ("*.json", "*.txt", "*.model", "*.jinja", "text_encoder*/*.safetensors")
TO_DRAW = (*NEEDED, "vae*/*.safetensors")
VARIANTS = ("*.fp16.safetensors", "*.fp16-*.safetensors")  # the same weights again
TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")  # in front of a text encoder's tensors
# folder of configurations in the package -> the text encoder by which a file is known, what pads its prompts
PACKAGED = {
    "sdxl": ("xl_base", {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}),
    "sd-2": ("open_clip", {"tokenizer": "!"}),
    "sd-1": ("clip", {"tokenizer": "<|endoftext|>"}),
}
UNKNOWN_NOISE = "sd-2"  # of which some predict the noise and some a velocity, under the same names


class Model(NamedTuple):
    """Which model a file holds, and where its configurations are."""

    file: TensorFile
    folder: Path  # in the layout of diffusers
    pipeline: str  # its class
    parts: dict[str, str]  # component -> its class
    component: str  # the denoiser
    tokenizers: dict[str, Any]  # those that the folder does not have


class Note(NamedTuple):
    """What the metadata of a file say was erased."""

    request: ConceptRequest
    facts: ConceptFacts
    guarantees: dict[str, float]
    proof: dict[str, float]
    edited: str  # the fingerprint of the edited weights


class OpenedFile(NamedTuple):
    """A checkpoint whose denoiser was left on the disk."""

    file: TensorFile
    pipe: DiffusionPipeline  # the text encoders and tokenizers
    denoiser: Denoiser  # on the meta device except for the layers that read text
    names: dict[str, str]  # layer -> its weight in the file
    kept: KeptFeatures | None  # what stands for the text encoders, if they were left on the disk, too


@with_options
def erase_file(
    source: str | os.PathLike,
    file: str | os.PathLike,
    concepts: str | Sequence[str] | Mapping[str, Sequence[str]],
    *,
    remap_to: str | Sequence[str] | Mapping[str, str | Sequence[str] | None] | None,
    text_encoder: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    quantize_text_encoder: EncoderBits | None = None,
    also_encode: Sequence[str] = (),
    **options: Any,
) -> ConceptErasure:
    """
    Erase concepts from a checkpoint in one file into another, without loading the denoiser.

    The file is copied, the edited layers are overwritten in the copy, and a line is added to its metadata.
    Every other byte stays as it was. The proof by run is missing, and the report says so.

    Args:
        source (`str` or `os.PathLike`):
            A `.safetensors` file under the names of the original checkpoints, as ComfyUI and A1111 read it,
            or a `.gguf` file in which the layers that read text are not quantized. The model is recognized by
            its tensors' names.
        file (`str` or `os.PathLike`):
            The copy, which is replaced if it exists.
        concepts, remap_to, options:
            As in [`erase_concept`], except `router` and `reach`.
        text_encoder (`str` or `os.PathLike`, *optional*):
            A folder of the same model in the layout of diffusers, or a Hub id, of which text encoders,
            tokenizers and configurations are downloaded. Not needed for Stable Diffusion 1.x, 2.x and XL,
            whose text encoders are in the file.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the text encoders run.
        quantize_text_encoder (`"8bit"` or `"4bit"`, *optional*):
            As in [`erase_to_folder`], for text encoders that are not in the file.
        also_encode (`Sequence[str]`, *optional*):
            As in [`erase_to_folder`].

    Returns:
        `ConceptErasure`: the report; `print` shows it.

    Raises:
        `IncompatibleBaseError`: the source cannot be read, is no known model, or is stored in a precision
        that an edit does not fit. `AlreadyErasedError`: it was erased before. `ExportError`: the copy cannot
        be written. `SiteNotFoundError` and `PrototypeError`: as from `erase_concept`. The source is never
        changed, and no half-written copy is left.

    Example:

        >>> import more_hf
        >>> from more_hf.data import FOLDER
        >>> from more_hf.saving.single_file import original_layout
        >>> from safetensors.torch import save_file
        >>> save_file(original_layout(more_hf.load_emoji_sd()), "emoji-sd.safetensors")
        >>> options = {"remap_to": "Fluent", "text_encoder": FOLDER / "emoji_sd"}
        >>> report = more_hf.erase_file("emoji-sd.safetensors", "erased.safetensors", "Blobmoji", **options)
        >>> assert more_hf.verify_file("erased.safetensors", text_encoder=FOLDER / "emoji_sd")
    """
    source, file = Path(source), Path(file)
    request = ConceptRequest.of(concepts, remap_to=remap_to, **options)
    refuse_inner_edit(request)
    refuse_router(request, "One file")
    refuse_weak(request)
    stored = read_tensor_file(source)
    _refuse_target(source, file)
    opened = open_file(stored, text_encoder, device, quantize_text_encoder)
    _refuse_rounding(opened)
    encoder = Encoder.of(opened.pipe, request, opened.denoiser, opened.kept)
    encode_ahead(encoder, request, read_names("also_encode", also_encode))
    erasure = erasure_of_layers(encoder, request)
    write_weights(erasure.sites, edited_weights(erasure))
    edited = {opened.names[name]: site.module.weight.detach() for name, site in erasure.sites.items()}
    note = note_of(erasure, {name: site.read() for name, site in erasure.sites.items()})
    opened.file.copy(file, edited, note)
    return erasure


def open_file(
    file: TensorFile,
    text_encoder: str | os.PathLike | None,
    device: torch.device | str,
    quantize: EncoderBits | None = None,
    *,
    keep: bool = True,
) -> OpenedFile:
    """
    Open a checkpoint without its denoiser. `text_encoder` is as in `erase_file`, and runs on the device;
    `quantize` is as in `pipeline_around`. Features are taken from the disk, and the text encoders left there,
    if `keep`.

    Raises:
        `IncompatibleBaseError`: it is no known model, or has no text encoder. `SiteNotFoundError`: as from
        `erase_concept`.
    """
    # 1. Recognize the model, and find its configurations.
    model = recognized_model(file, text_encoder)
    folder, component = model.folder, model.component
    cls = model.parts[component]
    # 2. Build the denoiser with no weights except those of the layers that read text.
    with reading(file.path):
        made_of = origins(cls, getattr(diffusers, cls).load_config(folder / component), file.tensors)
    try:
        denoiser = read_denoiser(folder, component, lambda prefix: _read(file, made_of, prefix), layers=True)
    except IncompatibleBaseError as error:
        raise IncompatibleBaseError(
            f"{file.path} does not fit the configuration in {folder / component} ({error.__cause__}). Pass "
            "the text encoder of the same model, of the same size."
        ) from error
    # 3. Open the rest; the text encoders are in the file or in the folder.
    given = {name: None for name, part in model.parts.items() if name == "vae" or part == cls}
    pipe, denoiser, kept = pipeline_around(
        folder,
        {component: denoiser.module},
        file.precision,
        device,
        {**given, **model.tokenizers},
        quantize,
        held=lambda: _text_encoders(model, file.precision),
        weights=digest_of({file.path: TEXT, **dict.fromkeys(encoder_files(folder), "")}) if keep else None,
    )
    pipe.register_to_config(_name_or_path=str(file.path))
    names = {}
    for name in find_layers(denoiser, pooled=True):
        (part,) = made_of[f"{name}.weight"].parts
        names[name] = part.name
    return OpenedFile(file, pipe, denoiser, names, kept)


def recognized_model(
    file: TensorFile, text_encoder: str | os.PathLike | None, needed: Sequence[str] = NEEDED
) -> Model:
    """
    Find out which model a file holds, and its configurations; of a Hub id, what is `needed` is downloaded.

    Raises:
        `IncompatibleBaseError`: it is no known model, or not that of `text_encoder`, or has none.
    """
    cls = recognized(file.path, file.tensors)
    folder, tokenizers = _configurations(file, cls, text_encoder, needed)
    pipeline, parts = read_index(folder)
    component = next((name for name, part in parts.items() if part == cls), None)
    if component is None:
        raise IncompatibleBaseError(
            f"{file.path} has a {cls}, which {text_encoder}, a {pipeline}, has not. Pass the text encoder of "
            "the same model."
        )
    return Model(file, folder, pipeline, parts, component, tokenizers)


def _configurations(
    file: TensorFile, cls: str, text_encoder: str | os.PathLike | None, needed: Sequence[str]
) -> tuple[Path, dict[str, Any]]:
    """The folder of a model's configurations, and the tokenizers that it does not have."""
    if text_encoder is not None:
        with reading(text_encoder):
            if Path(text_encoder).is_dir():
                return Path(text_encoder), {}
            return Path(
                snapshot_download(str(text_encoder), allow_patterns=needed, ignore_patterns=VARIANTS)
            ), {}
    for folder, (key, pads) in PACKAGED.items():
        if CHECKPOINT_KEY_NAMES[key] in file.tensors:
            return FOLDER / "configs" / folder, {name: clip_tokenizer(pad) for name, pad in pads.items()}
    raise IncompatibleBaseError(
        f"{file.path} has a {cls} without the text encoder that prototypes are made with. Pass "
        "`text_encoder=` (on the command line `--text_encoder`): a folder of the same model in the layout of "
        "diffusers, or its Hub id."
    )


def clip_tokenizer(pad: str) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer, from the vocabulary that is installed with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    plain = SimpleTokenizer()
    vocabulary = dict(plain.encoder)
    for theirs, ours in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        vocabulary[ours] = vocabulary.pop(theirs)
    return transformers.CLIPTokenizer(
        vocab=vocabulary, merges=list(plain.bpe_ranks), pad_token=pad, model_max_length=plain.context_length
    )


def _read(file: TensorFile, made_of: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors of a layer, by their names without its prefix."""
    tensors = {}
    for name, origin in made_of.items():
        if name.startswith(prefix):
            (part,) = origin.parts
            tensors[name.removeprefix(prefix)] = file.read_dense(part.name)
    return tensors


def _text_encoders(model: Model, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All text encoders if the file holds any; those that it lacks are the folder's."""
    held = {name: model.file.read(name) for name in model.file.tensors if name.startswith(TEXT)}
    names = [name for name in model.parts if name.startswith("text_encoder")] if held else []
    options = {"cached_model_config_path": str(model.folder), "torch_dtype": dtype, "local_files_only": True}
    options |= {"pipelines": None, "is_pipeline_module": False}
    with reading(model.file.path):
        found = {
            name: load_single_file_sub_model("transformers", model.parts[name], name, held, **options)
            for name in names
        }
    return {name: encoder.eval() for name, encoder in found.items()}  # diffusers leaves T5 in training


def load_file(
    file: str | os.PathLike,
    *,
    text_encoder: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """
    Load the whole pipeline of a checkpoint in one file, erased or not, for example to `compare` the two.

    diffusers' `from_single_file` reads the denoiser, and the VAE and the text encoders where the file has
    them. If the file is erased, `get_erasure` then knows what its metadata say.

    Args:
        file (`str` or `os.PathLike`):
            The file, as in [`erase_file`].
        text_encoder (`str` or `os.PathLike`, *optional*):
            As in [`erase_file`]. What the file lacks comes from there, the VAE and the scheduler included.
        dtype (`torch.dtype`, *optional*):
            What to load it in; by default as it is stored.

    Returns:
        `DiffusionPipeline`: the pipeline.

    Raises:
        `IncompatibleBaseError`: as from [`erase_file`]; or diffusers opens no such file, or not all of the
        model is there.

    Example:

        >>> import more_hf
        >>> from more_hf.data import FOLDER
        >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
        >>> file = more_hf.save_checkpoint(pipe, "erased.safetensors")
        >>> print(more_hf.get_erasure(more_hf.load_file(file, text_encoder=FOLDER / "emoji_sd")))
    """
    model = recognized_model(read_tensor_file(file), text_encoder, TO_DRAW)
    _refuse_incomplete(model)
    dtype = dtype or model.file.precision
    options = {"config": str(model.folder), "torch_dtype": dtype, "local_files_only": True}
    if Path(file).suffix == ".gguf":
        options["quantization_config"] = GGUFQuantizationConfig(compute_dtype=dtype)
    has_vae = any(name.startswith(tuple(LDM_VAE_KEYS)) for name in model.file.tensors)
    read = {}
    with reading(file):
        for name in (model.component, *(["vae"] if has_vae else [])):
            cls = getattr(diffusers, model.parts[name])
            read[name] = cls.from_single_file(str(file), subfolder=name, **options)
    denoiser = {model.component: read.pop(model.component)}
    given = {**read, **model.tokenizers, **_text_encoders(model, dtype)}
    pipe, found, _ = pipeline_around(model.folder, denoiser, dtype, "cpu", given)
    pipe.register_modules(**denoiser)
    pipe.register_to_config(_name_or_path=str(file))
    if model.file.note is not None:
        note = _read_note(model.file)
        sites = find_sites(pipe, found, pooled=note.request.pooled)
        measured = note.guarantees, note.proof
        register(found.module, ConceptErasure(note.request, note.facts, sites, {}, None, *measured))
    return pipe


def _refuse_incomplete(model: Model) -> None:
    """Raises `IncompatibleBaseError` for a file from which no pipeline that draws can be made."""
    path, cls = model.file.path, model.parts[model.component]
    if cls not in SINGLE_FILE_LOADABLE_CLASSES:
        raise IncompatibleBaseError(
            f"diffusers opens no file of a {cls}, so {path} cannot be drawn with. Erase from a folder of "
            "this model, and load that."
        )
    if len(denoisers := denoiser_names(model.pipeline, model.parts)) > 1:
        raise IncompatibleBaseError(
            f"{path} holds one of the {len(denoisers)} denoisers of {model.folder}, and a picture needs all "
            "of them erased. Erase from the folder (`more_hf.erase_to_folder`), and load that."
        )
    if model.folder == FOLDER / "configs" / UNKNOWN_NOISE:
        raise IncompatibleBaseError(
            f"{path} does not say whether it predicts the noise or a velocity, as some of this model do. "
            "Pass `text_encoder=` (on the command line `--text_encoder`): a folder of the same model, whose "
            "scheduler says it."
        )


def _refuse_target(source: Path, file: Path) -> None:
    if file.suffix != source.suffix:
        raise ExportError(
            f"{file} should end in {source.suffix}, as the source does. Give it a name that does."
        )
    if file.exists() and source.exists() and file.samefile(source):
        raise ExportError(f"{file} is the original itself, which is never changed. Choose another name.")
    refuse_saved_folder(file, "whose record does not cover a second set of weights")


def _refuse_rounding(opened: OpenedFile) -> None:
    """Raises `IncompatibleBaseError` for a file whose precision an edit does not fit."""
    file = opened.file
    if file.note is not None:
        raise AlreadyErasedError(
            f"{file.path} was saved erased (its metadata say so), and the original weights are not there. "
            "Start from the original file and erase everything at once."
        )
    if any(name.startswith("model_ema.") for name in file.tensors):
        raise IncompatibleBaseError(
            f"{file.path} also has a moving average of the weights (`model_ema.`), which would keep the "
            "concept. Remove it first, or take the model's file that is called pruned."
        )
    # Programs that load a file with fp8 in it may round every layer to that.
    names = bare_names(file.tensors).values()
    if not any(file.tensors[name].dtype in FP8 for name in names):
        names = opened.names.values()
    if rough := [name for name in names if file.tensors[name].dtype not in EDITABLE]:
        raise IncompatibleBaseError(
            f"`{rough[0]}` in {file.path} is stored in {file.tensors[rough[0]].dtype}, which rounds a weight "
            "by more than an edit changes it. Write a LoRA for this file: `more-hf lora`, or "
            "`more_hf.erase_to_lora`."
        )


def verify_file(
    file: str | os.PathLike,
    *,
    text_encoder: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
) -> Verification:
    """
    Check a checkpoint in one file against what its metadata say was erased.

    The prototypes are computed again with the text encoder, and every layer that reads text must send each
    forgotten one where its target goes.

    Args:
        file (`str` or `os.PathLike`):
            A file that `erase_file` or `save_checkpoint` wrote.
        text_encoder, device:
            As in [`erase_file`].

    Returns:
        [`Verification`]: true if every check passed; `print` shows the checks and their findings.

    Raises:
        `IncompatibleBaseError`: the file cannot be read, or says nothing of an erasure.
    """
    stored = read_tensor_file(file)
    note = _read_note(stored)
    request, facts = note.request, note.facts
    opened = open_file(stored, text_encoder, device, keep=False)
    layers, edited = [], {}
    for name, reader in find_layers(opened.denoiser, pooled=request.pooled).items():
        edited[name] = reader.module.weight.detach()[:, : reader.columns]
        layers.append(Layer(name, reader.space, list(edited[name].shape)))
    found = fingerprint(edited)
    checks = [
        Check("the edited layers are those that were saved", found == note.edited, f"sha256 {found[:12]}")
    ]
    removed = removed_from(Encoder.of(opened.pipe, request, opened.denoiser), request, facts)
    name = check_of(facts, request.remap_to.values(), request.strength)
    checks.append(remapped(name, edited, layers, removed))
    return Verification(tuple(checks))


def _read_note(file: TensorFile) -> Note:
    """What the metadata say was erased."""
    with reading(file.path):
        if file.note is None:
            raise IncompatibleBaseError(
                f"The metadata of {file.path} say nothing of an erasure, so there is nothing to check it "
                "against. Erase with `more_hf.erase_file`, which writes what it did."
            )
        note = json.loads(file.note)
        measured = {name: note.get(name, {}) for name in ("guarantees", "proof")}  # earlier files have none
        for name, values in measured.items():
            check_type(name, values, dict[str, float])
        request = ConceptRequest.from_dict(note["request"])
        return Note(request, read_fields(ConceptFacts, note["facts"]), **measured, edited=note["edited"])
