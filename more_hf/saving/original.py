"""Which tensors of an original checkpoint a denoiser of diffusers is made of, by diffusers' conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import LDM_UNET_KEY
from torch import Tensor, nn

from ..core.errors import ExportError, IncompatibleBaseError


PREFIXES = (LDM_UNET_KEY, "diffusion_model.")  # in front of the denoiser's tensors, or nothing
# A denoiser's class -> weights that its original files have, and no file of a class above it. The first ones
# read text.
MARKS = {
    "UNet2DConditionModel": "middle_block.1.transformer_blocks.0.attn2.to_k input_blocks.0.0",
    "SD3Transformer2DModel": "context_embedder y_embedder.mlp.0 joint_blocks.0.x_block.attn.qkv",
    "FluxTransformer2DModel": "txt_in vector_in.in_layer double_blocks.0.img_mod.lin",
    "ChromaTransformer2DModel": "txt_in distilled_guidance_layer.in_proj",
    "Flux2Transformer2DModel": "txt_in double_stream_modulation_txt.lin",
    "ZImageTransformer2DModel": "cap_embedder.1 layers.0.adaLN_modulation.0",
    "Lumina2Transformer2DModel": "cap_embedder.1 layers.0.adaLN_modulation.1",
    "QwenImageTransformer2DModel": "txt_in txt_norm transformer_blocks.0.txt_mod.1",
    "WanTransformer3DModel": "text_embedding.0 blocks.0.cross_attn.norm_k",
    "AuraFlowTransformer2DModel": "cond_seq_linear double_layers.0.attn.w1q",
    "SanaTransformer2DModel": "y_embedder.y_proj.fc1 attention_y_norm",
    "HiDreamImageTransformer2DModel": "caption_projection.0.linear p_embedder.pooled_embedder.linear_1",
    "PixArtTransformer2DModel": "y_embedder.y_proj.fc1 blocks.0.cross_attn.kv_linear",
}
# A denoiser's class -> `config ->` names by which its conversion counts layers and knows the parts they have.
COUNTED = {
    "SD3Transformer2DModel": lambda config: [
        *(f"joint_blocks.{i}." for i in range(config.num_layers)),
        *(["joint_blocks.0.x_block.attn.ln_q"] if config.qk_norm else []),
        *(f"joint_blocks.{i}.x_block.attn2." for i in config.dual_attention_layers),
    ],
    "FluxTransformer2DModel": lambda config: [
        *(f"double_blocks.{i}." for i in range(config.num_layers)),
        *(f"single_blocks.{i}." for i in range(config.num_single_layers)),
        *(["guidance_in."] if config.guidance_embeds else []),
    ],
}
LORA = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "_lora.", ".hada_w1_a", ".lokr_w1")
VAE = ("first_stage_model.", "vae.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# what some quantized files store beside a layer
SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


class Part(NamedTuple):
    """One of `count` parts of an original tensor, cut by rows."""

    name: str
    index: int = 0
    count: int = 1


class Origin:
    """
    Stands for a tensor in a conversion, which cuts and joins tensors by rows, and knows what it is made of.
    """

    shape = (1, 1)

    def __init__(self, *parts: Part):
        self.parts = parts

    def chunk(self, count: int, dim: int = 0) -> list[Origin]:
        """As torch's."""
        (part,) = self.parts
        return [Origin(Part(part.name, i, count)) for i in range(count)]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.cat:
            return cls(*(part for origin in args[0] for part in origin.parts))
        origin, parts = args[:2]  # of `torch.chunk` the number of parts, of `torch.split` their sizes
        return origin.chunk(parts if isinstance(parts, int) else len(parts))


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """The denoiser's tensors: name without prefix -> name in the file."""
    names = [name for name in names if not name.endswith(SCALES)]
    prefix = next((start for start in PREFIXES if any(name.startswith(start) for name in names)), "")
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}


def recognized(path: Path, names: Iterable[str]) -> str:
    """
    The class of the denoiser in an original checkpoint, by its tensors' names.

    Raises:
        `IncompatibleBaseError`: it is none that is known. The message names the nearest one.
    """
    names = list(names)
    bare = bare_names(names)
    marks = {cls: [f"{mark}.weight" for mark in of_cls.split()] for cls, of_cls in MARKS.items()}
    for cls, of_cls in marks.items():
        if bare.keys() >= set(of_cls):
            return cls
    if any(kind in name for name in names for kind in LORA):
        raise IncompatibleBaseError(
            f"{path} is a LoRA, which changes a model and is none. Name the checkpoint that it is for, and "
            "load it into the erased model afterwards."
        )
    if all(name.startswith(VAE) for name in names):
        raise IncompatibleBaseError(
            f"{path} holds a VAE alone, which reads no text. Name the file with the denoiser."
        )
    nearest = max(marks, key=lambda cls: len(bare.keys() & set(marks[cls])))
    message = f"{path} is no checkpoint of a known model in its original layout."
    if bare.keys() & set(marks[nearest]):
        lacks = [f"`{mark}`" for mark in marks[nearest] if mark not in bare]
        message += f" The nearest is {nearest}, without {', '.join(lacks)}."
    raise IncompatibleBaseError(
        f"{message} Known are {', '.join(MARKS)}. Name one of these, or a folder of diffusers "
        "(`more_hf.erase_to_folder`)."
    )


def origins(cls: str, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Origin]:
    """diffusers' name of every tensor of a denoiser -> what it is made of in a file with these tensors."""
    prefix = LDM_UNET_KEY if cls == "UNet2DConditionModel" else ""
    stand_ins = {prefix + bare: Origin(Part(name)) for bare, name in bare_names(names).items()}
    return conversion(cls)(checkpoint=stand_ins, config=config)


def conversion(cls: str) -> Callable[..., dict[str, Any]]:
    """`(checkpoint, config) ->` its tensors under diffusers' names."""
    if cls == "PixArtTransformer2DModel":  # for which diffusers has none: what reads text
        return lambda checkpoint, config: {
            name.replace("y_embedder.y_proj.fc", "caption_projection.linear_"): origin
            for name, origin in checkpoint.items()
        }
    return SINGLE_FILE_LOADABLE_CLASSES[cls]["checkpoint_mapping_fn"]


class _Asked(dict):
    """A checkpoint that has every tensor that a conversion asks for."""

    def pop(self, name: str, default: Any = None) -> Origin:
        return Origin(Part(name))

    __missing__ = pop


def original_tensors(module: nn.Module, counted: Iterable[str]) -> dict[str, Tensor]:
    """
    A denoiser's tensors under the names for which diffusers' conversion asks; it counts layers by others.

    Raises:
        `ExportError`: some tensors have no place in an original file.
    """
    made_of = conversion(type(module).__name__)(checkpoint=_Asked.fromkeys(counted), config=module.config)
    tensors = module.state_dict()
    if strange := sorted(made_of.keys() ^ tensors.keys()):
        raise ExportError(
            f"`{strange[0]}` has no place in a checkpoint of the original {type(module).__name__}: this is "
            "another model, or a LoRA or adapter is loaded. Fuse or unload it first, or save the pipeline as "
            "a folder with `more_hf.save`."
        )
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, origin in made_of.items():
        for part, tensor in zip(origin.parts, tensors[name].chunk(len(origin.parts)), strict=True):
            pieces.setdefault(part.name, {})[part.index] = tensor
    return {name: torch.cat([found[i] for i in sorted(found)]) for name, found in pieces.items()}
