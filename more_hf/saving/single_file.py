"""Export a Stable Diffusion 1.x or 2.x pipeline as one file under the names that ComfyUI and A1111 open."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .. import __version__
from ..core.errors import ExportError
from ..core.files import replacing
from ..core.site import EDITABLE
from ..diffusion.encoder import Encoder
from ..diffusion.erase import get_erasure
from ..diffusion.sites import find_denoiser
from .check import left_over, most_left, removed_from
from .files import writing
from .folder import refuse_saved_folder


UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."

# beginning of a diffusers name -> beginning of the original name
_UNET = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "mid_block.attentions.0.": "middle_block.1.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
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

    The text encoder keeps transformers' names in Stable Diffusion 1.x; in 2.x it has OpenCLIP's, with query,
    key and value in one matrix. The last text layer and the projection of the 2.x checkpoint are left out,
    because no 2.x pipeline uses or has them.

    Raises:
        `ExportError`: a tensor has no place in a checkpoint: another model, an adapter, or an unfused LoRA.
    """
    denoiser = find_denoiser(pipe)
    unet = denoiser.module
    if denoiser.name != "unet":
        raise ExportError(
            f"A {type(unet).__name__} has no Stable Diffusion 1.x or 2.x checkpoint. Save a folder with "
            "`more_hf.save`."
        )
    tensors = _renamed(unet.state_dict(), _unet_names(unet), UNET)
    for name, tensor in _renamed(pipe.vae.state_dict(), _vae_names(pipe.vae), VAE).items():
        is_projection = ".mid.attn_1." in name and tensor.ndim == 2
        tensors[name] = tensor[:, :, None, None] if is_projection else tensor  # a 1×1 convolution there
    encoder = pipe.text_encoder
    text = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    if unet.config.use_linear_projection:  # Stable Diffusion 2.x
        return {**tensors, **_open_clip(text, encoder.config.num_hidden_layers)}
    return {**tensors, **{CLIP + name: tensor for name, tensor in text.items()}}


def site_keys(pipe: DiffusionPipeline, sites: Mapping[str, object]) -> dict[str, str]:
    """Site -> the name of its weight in `original_layout`."""
    names = _unet_names(find_denoiser(pipe).module)
    return {site: UNET + _rename(f"{site}.weight", names) for site in sites}


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    return {prefix + _rename(name, names): tensor for name, tensor in tensors.items()}


def _rename(name: str, names: Mapping[str, str]) -> str:
    start = next((start for start in names if name.startswith(start)), None)
    if start is None or "lora_" in name or ".processor." in name:
        raise ExportError(
            f"`{name}` has no place in a Stable Diffusion 1.x or 2.x checkpoint: this is another model, or a "
            "LoRA or adapter is loaded. Fuse or unload it first, or save the pipeline as a folder with "
            "`more_hf.save`."
        )
    return names[start] + name[len(start) :]


def _unet_names(unet: nn.Module) -> dict[str, str]:
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


def _open_clip(text: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    names, joined = dict(_OPEN_CLIP), {}
    for i in range(layers):
        place = f"transformer.resblocks.{i}."
        names |= _inside(f"encoder.layers.{i}.", place, _OPEN_CLIP_LAYER)
        for kind in ("weight", "bias"):
            parts = [text[f"encoder.layers.{i}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            joined[f"{OPEN_CLIP}{place}attn.in_proj_{kind}"] = torch.cat(parts)
    others = {name: tensor for name, tensor in text.items() if not re.search(r"\.[qkv]_proj\.", name)}
    return {**_renamed(others, names, OPEN_CLIP), **joined}


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
    Write an erased Stable Diffusion 1.x or 2.x pipeline as one checkpoint file, for ComfyUI, A1111 and
    `from_single_file`.

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
    removed = removed_from(Encoder.of(pipe, erasure.request), erasure.request, erasure.facts)["tokens"]
    for site, name in site_keys(pipe, erasure.sites).items():
        left = left_over(tensors[name], removed)
        if not left < most_left(removed):
            raise ExportError(
                f"`{site}` still tells the concept from its target ({left:.1e} is left). Was a LoRA fused, "
                "or the model or its text encoder changed since? Undo that, then save."
            )
    facts = {"more_hf": __version__, "request": erasure.request.to_dict(), "base": erasure.facts.base}
    with writing(file), replacing(file) as draft:
        draft.write_bytes(to_bytes(tensors, metadata={"format": "pt", "more_hf": json.dumps(facts)}))
    return file
