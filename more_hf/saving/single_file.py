"""Export a pipeline as one file under the names of the original checkpoints, which ComfyUI and A1111 open."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, LDM_UNET_KEY
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..core.errors import ExportError
from ..core.files import replacing
from ..core.site import EDITABLE
from ..diffusion.encoder import Encoder
from ..diffusion.erase import get_erasure
from ..diffusion.sites import find_denoiser
from .check import left_over, most_left, removed_from
from .files import writing
from .folder import refuse_saved_folder
from .original import COUNTED, original_tensors, origins
from .tensor_file import NOTE, note_of


VAE = "first_stage_model."
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
# family -> what stands in front of the tensors of each text encoder
TEXT_ENCODERS = {
    "Stable Diffusion 1.x and 2.x": ("cond_stage_model.transformer.",),
    "Stable Diffusion XL": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
    "Stable Diffusion 3": (CLIP_L, CLIP_G, T5),
    "FLUX": (CLIP_L, T5),
}

# beginning of a diffusers name -> beginning of the original name
_UNET = {
    **DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"],
    **DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"],
    "mid_block.attentions.0.": "middle_block.1.",
}
_UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE = {"conv_in.": "conv_in.", "conv_norm_out.": "norm_out.", "conv_out.": "conv_out."}
_VAE_RESNET = {
    "norm1.": "norm1.",
    "conv1.": "conv1.",
    "norm2.": "norm2.",
    "conv2.": "conv2.",
    "conv_shortcut.": "nin_shortcut.",
}
_VAE_ATTENTION = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}


def original_layout(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """
    All weights of the pipeline under the original checkpoint's names. The pipeline is not changed; most
    tensors are its own.

    Text encoders keep transformers' names, except those of OpenCLIP, with query, key and value in one matrix:
    of Stable Diffusion 2.x and the second one of XL. The last text layer and the projection of the 2.x
    checkpoint are left out, because no 2.x pipeline uses or has them.

    Raises:
        `ExportError`: a tensor has no place in a checkpoint: another model, an adapter, or an unfused LoRA.
    """
    denoiser, vae = find_denoiser(pipe), pipe.vae
    module, places = denoiser.module, TEXT_ENCODERS.get(denoiser.family.name)
    if places is None:
        raise ExportError(
            f"A {type(module).__name__} of {denoiser.family.name} has no checkpoint in one file here; "
            f"{', '.join(TEXT_ENCODERS)} have. Save a folder with `more_hf.save`."
        )
    if denoiser.name == "unet":
        tensors = _renamed(module.state_dict(), unet_names(module), LDM_UNET_KEY)
        if module.config.use_linear_projection and len(places) == 1:
            places = ("cond_stage_model.model.",)  # Stable Diffusion 2.x
    else:
        own = original_tensors(module, COUNTED[type(module).__name__](module.config))
        tensors = {LDM_UNET_KEY + name: tensor for name, tensor in own.items()}
    for name, tensor in _renamed(vae.state_dict(), _vae_names(vae), VAE).items():
        is_projection = ".mid.attn_1." in name and tensor.ndim == 2
        tensors[name] = tensor[:, :, None, None] if is_projection else tensor  # a 1×1 convolution there
    encoders = sorted(name for name in pipe.components if name.startswith("text_encoder"))
    for name, place in zip(encoders, places, strict=True):
        tensors |= _text_tensors(getattr(pipe, name), place)
    return tensors


def _text_tensors(encoder: nn.Module, place: str) -> dict[str, Tensor]:
    """A text encoder's tensors; OpenCLIP's are in a `model`."""
    tensors = encoder.state_dict()
    if "CLIP" not in type(encoder).__name__:
        # the same tensor twice; files hold no tensor that shares another's memory
        return {place + name: tensor.clone() for name, tensor in tensors.items()}
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if place.endswith(".model."):
        return _open_clip(tensors, encoder.config.num_hidden_layers, place)
    inner = {name: "" if name.startswith("text_projection.") else "text_model." for name in tensors}
    return {f"{place}{inner[name]}{name}": tensor for name, tensor in tensors.items()}


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    return {prefix + _rename(name, names): tensor for name, tensor in tensors.items()}


def _rename(name: str, names: Mapping[str, str]) -> str:
    start = next((start for start in names if name.startswith(start)), None)
    if start is None or "lora_" in name or ".processor." in name:
        raise ExportError(
            f"`{name}` has no place in a checkpoint of Stable Diffusion: this is another model, or a "
            "LoRA or adapter is loaded. Fuse or unload it first, or save the pipeline as a folder with "
            "`more_hf.save`."
        )
    return names[start] + name[len(start) :]


def unet_names(unet: nn.Module) -> dict[str, str]:
    """Beginning of a name in diffusers' UNet -> its beginning in the original's."""
    names = {**_UNET, **_inside("mid_block.resnets.0.", "middle_block.0.", _UNET_RESNET)}
    names |= _inside("mid_block.resnets.1.", "middle_block.2.", _UNET_RESNET)
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names |= _inside(f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{number}.0.", _UNET_RESNET)
            names[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{number}.1."
            number += 1
        names[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{number}.0.op."
        number += 1
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            names |= _inside(f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{number}.0.", _UNET_RESNET)
            names[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{number}.1."
            number += 1
        place = 2 if hasattr(block, "attentions") else 1  # after the last layer's resnet and attention
        names[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{number - 1}.{place}."
    return names


def _vae_names(vae: nn.Module) -> dict[str, str]:
    names = {"quant_conv.": "quant_conv.", "post_quant_conv.": "post_quant_conv."}
    for side, part in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        names |= _inside(f"{side}.", f"{side}.", _VAE)
        names |= _inside(f"{side}.mid_block.attentions.0.", f"{side}.mid.attn_1.", _VAE_ATTENTION)
        for j in range(len(part.mid_block.resnets)):
            names |= _inside(f"{side}.mid_block.resnets.{j}.", f"{side}.mid.block_{j + 1}.", _VAE_RESNET)
        blocks = part.down_blocks if side == "encoder" else part.up_blocks
        down, change = ("down", "downsample") if side == "encoder" else ("up", "upsample")
        for i, block in enumerate(blocks):
            number = i if side == "encoder" else len(blocks) - 1 - i  # the decoder's are counted from its end
            place = f"{side}.{down}.{number}."
            for j in range(len(block.resnets)):
                names |= _inside(f"{side}.{down}_blocks.{i}.resnets.{j}.", f"{place}block.{j}.", _VAE_RESNET)
            names[f"{side}.{down}_blocks.{i}.{change}rs.0."] = f"{place}{change}."
    return names


def _open_clip(text: dict[str, Tensor], layers: int, prefix: str) -> dict[str, Tensor]:
    names, joined = dict(_OPEN_CLIP), {}
    for i in range(layers):
        place = f"transformer.resblocks.{i}."
        names |= _inside(f"encoder.layers.{i}.", place, _OPEN_CLIP_LAYER)
        for kind in ("weight", "bias"):
            parts = [text[f"encoder.layers.{i}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            joined[f"{prefix}{place}attn.in_proj_{kind}"] = torch.cat(parts)
    if "text_projection.weight" in text:
        joined[f"{prefix}text_projection"] = text.pop("text_projection.weight").T
    others = {name: tensor for name, tensor in text.items() if not re.search(r"\.[qkv]_proj\.", name)}
    return {**_renamed(others, names, prefix), **joined}


def _inside(start: str, place: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {start + old: place + new for old, new in parts.items()}


def refuse_other_suffix(file: Path) -> None:
    """Raises `ExportError` for a file of another format."""
    if file.suffix != ".safetensors":
        raise ExportError(
            f"{file} does not end in .safetensors, the one checkpoint format that cannot carry code. "
            "Give it a name that does."
        )


def save_checkpoint(
    pipe: DiffusionPipeline, file: str | os.PathLike, *, dtype: torch.dtype = torch.float16
) -> Path:
    """
    Write an erased pipeline of Stable Diffusion 1.x, 2.x, XL or 3 or of FLUX as one checkpoint file, for
    ComfyUI, A1111 and `from_single_file`.

    It holds the text encoder, the denoiser and the VAE under the names of the original checkpoints. The
    pipeline is not changed.

    Args:
        pipe (`DiffusionPipeline`):
            An erased pipeline.
        file (`str` or `os.PathLike`):
            A path that ends in `.safetensors`; an existing file is replaced.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`):
            Dtype of all tensors.

    Returns:
        `Path`: the file.

    Raises:
        `ExportError`: nothing was erased; the pipeline has tensors without a place in such a file; its
        weights are not the erased ones; the file would be in a folder that `save` wrote, whose record does
        not cover it; or it could not be written. Nothing is written then.

    Example:

    ```py
    >>> import more_hf

    >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
    >>> file = more_hf.save_checkpoint(pipe, "emoji-sd-without-blobmoji.safetensors")
    ```
    """
    file = Path(file)
    refuse_other_suffix(file)
    if dtype not in EDITABLE:
        raise ExportError(f"`dtype` must be one of {', '.join(map(str, EDITABLE))}, got {dtype!r}.")
    refuse_saved_folder(file, "whose record does not cover a second set of weights")
    erasure = get_erasure(pipe)
    if erasure is None:
        raise ExportError("Nothing was erased from this pipeline. Call `more_hf.erase_concept` first.")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in original_layout(pipe).items()}
    denoiser = find_denoiser(pipe)
    made_of = origins(type(denoiser.module).__name__, denoiser.module.config, tensors)
    removed = removed_from(Encoder.of(pipe, erasure.request), erasure.request, erasure.facts)
    edited = {}
    for site, layer in erasure.sites.items():
        (part,) = made_of[f"{site}.weight"].parts
        edited[site], gone = tensors[part.name][:, : layer.columns], removed[layer.space]
        left = left_over(edited[site], gone)
        if not left < most_left(gone):
            raise ExportError(
                f"`{site}` still tells the concept from its target ({left:.1e} is left). Was a LoRA fused, "
                "or the model or its text encoder changed since? Undo that, then save."
            )
    with writing(file), replacing(file) as draft:
        draft.write_bytes(to_bytes(tensors, metadata={"format": "pt", NOTE: note_of(erasure, edited)}))
    return file
