"""The denoiser families, one entry each in `FAMILIES`: which layers read text, and how to call one once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import FrozenDict as Config
from diffusers.models.attention_processor import (
    Attention,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
)
from diffusers.models.embeddings import ImageProjection
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn
from torch.nn.functional import pad

from ..core.errors import SiteNotFoundError
from .text import (
    CHROMA,
    COGVIEW_4,
    FLUX,
    FLUX_2,
    HIDREAM,
    HUNYUAN_IMAGE,
    KANDINSKY_5,
    KOLORS,
    LUMINA_2,
    PIXART,
    QWEN_IMAGE,
    SANA,
    SD3,
    SDXL,
    STABLE_DIFFUSION,
    Z_IMAGE,
    ZEROS,
    Text,
    layer_space,
)


# attention processors with text projections of their own
CUSTOM_DIFFUSION = (
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
)
# other ways of a UNet to be conditioned, and the values that are understood here
CONDITIONS = {
    "encoder_hid_dim_type": (None, "ip_image_proj"),
    "class_embed_type": (None,),
    "attention_type": ("default",),
}
TIME_IDS = 6  # sizes and crop of Stable Diffusion XL, embedded after the pooled text
WAN_LENGTH = 512  # positions of a prompt in Wan
GUIDANCE = 3.5  # of distilled models, which read it like the timestep
AS_IN_DIFFUSERS = {"": ""}  # names of a model that ComfyUI and diffusers took over alike

Place = tuple[str | int, ...]  # among the arguments of `forward`: a name, and a key or an index in it


class Reader(NamedTuple):
    """A layer that reads text."""

    module: nn.Module
    space: str = "tokens"
    columns: int | None = None  # how many of the weight's first columns read text, if not all


@dataclass(frozen=True)
class Family:
    """
    One kind of denoiser: all that the package knows about it.

    Args:
        name (`str`):
            As people know it.
        find (`Callable`):
            `denoiser -> {name: Reader}`: every layer that reads text.
        call (`Callable`):
            `(denoiser, {space: features}) -> output` `(batch, ...)`: one forward pass on a fixed input; a
            `Call` or a function. Without `"pooled"` that feature is zero.
        text (`Text`, *optional*):
            How its pipelines encode prompts; by default as another family with the same text encoders does.
        pooled (`Place`, *optional*):
            Where the pooled feature is among the arguments of `forward`.
        places (`Callable`, *optional*):
            `denoiser -> {space: Place}`: where each space of tokens is among the arguments of `forward`,
            `"tokens"` first; by default `encoder_hidden_states` holds all.
        norms (`Mapping[str, str]`, *optional*):
            Space -> the module that its features go through between `encode_prompt` and the layers that read
            them. Prototypes are means of what comes out of it: E and a norm do not commute.
        joined (`bool`, *optional*, defaults to `False`):
            Whether the norm sees the prompts of a batch joined, as Z-Image's does.
        unrecorded_layers (`str`, *optional*):
            Which layers inside have inputs that cannot be recorded, if any, so that `reach="denoiser"` would
            leave them as they are.
        lora (`bool`, *optional*, defaults to `True`):
            Whether diffusers loads a LoRA into its pipelines.
        original (`Mapping[str, str]`, *optional*):
            Beginning of a parameter's name -> what ComfyUI's model, and mostly the original checkpoint, has
            there; of UNets these names follow from their blocks. Empty if ComfyUI has no such model.
        kohya (`Mapping[str, str]`, *optional*):
            Layer -> its name in kohya's format, where that differs; `None` if the format has no such layers.
    """

    name: str
    find: Callable[[nn.Module], dict[str, Reader]]
    call: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    text: Text | None = None
    pooled: Place = ()
    places: Callable[[nn.Module], dict[str, Place]] = lambda denoiser: {"tokens": ("encoder_hidden_states",)}
    norms: Mapping[str, str] = field(default_factory=dict)
    joined: bool = False
    unrecorded_layers: str = ""
    lora: bool = True
    original: Mapping[str, str] = field(default_factory=dict)
    kohya: Mapping[str, str] | None = None


def _find_unet(unet: nn.Module) -> dict[str, Reader]:
    """to_k and to_v of every attention that reads text; an IP-Adapter's projections read images and stay."""
    for option, understood in CONDITIONS.items():
        if unet.config[option] not in understood:
            raise SiteNotFoundError(
                f"This UNet also reads its conditions through `{option}={unet.config[option]!r}`, which is "
                "not supported yet. Use a plain UNet of Stable Diffusion or Stable Diffusion XL."
            )
    layers = {}
    for name, module in unet.named_modules():
        # self-attention reads the picture
        if not isinstance(module, Attention) or not module.is_cross_attention:
            continue
        if hasattr(module, "to_kv"):
            raise SiteNotFoundError(
                f"`{name}` has fused projections, which keep a copy of the original weights and are saved "
                "with the model. Load the pipeline again without `fuse_qkv_projections()`, erase, then fuse."
            )
        if isinstance(module.processor, CUSTOM_DIFFUSION):
            raise SiteNotFoundError(
                f"`{name}` has a Custom Diffusion processor with text projections of its own. "
                "Call `unet.set_default_attn_processor()` first, or erase without it."
            )
        layers[f"{name}.to_k"] = Reader(module.to_k)
        layers[f"{name}.to_v"] = Reader(module.to_v)
    return layers


def _find_sdxl(unet: nn.Module) -> dict[str, Reader]:
    """As `_find_unet`, and the columns of `add_embedding.linear_1` before those that read the time ids."""
    pooled = Reader(unet.add_embedding.linear_1, "pooled", _pooled_width(unet))
    return {**_find_unet(unet), "add_embedding.linear_1": pooled}


def _find_kolors(unet: nn.Module) -> dict[str, Reader]:
    """The projection in front of all attention, and the columns of `add_embedding` as in `_find_sdxl`."""
    if getattr(unet, "text_encoder_hid_proj", None) is not None:
        raise SiteNotFoundError(
            "An IP-Adapter has moved the layer of Kolors that reads text, and what is saved with it does not "
            "load without it. Call `pipe.unload_ip_adapter()`, erase, and load it again."
        )
    pooled = Reader(unet.add_embedding.linear_1, "pooled", _pooled_width(unet))
    return {"encoder_hid_proj": Reader(unet.encoder_hid_proj), "add_embedding.linear_1": pooled}


def _pooled_width(unet: nn.Module) -> int:
    return unet.config.projection_class_embeddings_input_dim - TIME_IDS * unet.config.addition_time_embed_dim


def _find_sd3_or_flux(transformer: nn.Module) -> dict[str, Reader]:
    """These two read text once, before all blocks."""
    if getattr(transformer, "encoder_hid_proj", None) is not None:
        raise SiteNotFoundError(
            "An IP-Adapter is loaded, without whose picture this transformer does not run. Call "
            "`pipe.unload_ip_adapter()`, erase, and load it again."
        )
    return _find("context_embedder", pooled="time_text_embed.text_embedder.linear_1")(transformer)


def _find(*names: str, pooled: str | None = None) -> Callable[[nn.Module], dict[str, Reader]]:
    """These layers, all in the space of tokens, and the one that reads the pooled feature."""
    spaces = dict.fromkeys(names, "tokens")
    if pooled is not None:
        spaces[pooled] = "pooled"
    return lambda denoiser: _readers(denoiser, spaces)


def _readers(denoiser: nn.Module, spaces: Mapping[str, str]) -> dict[str, Reader]:
    """The readers by their layers' names, each with its space."""
    return {name: Reader(denoiser.get_submodule(name), space) for name, space in spaces.items()}


def _find_hidream(transformer: nn.Module) -> dict[str, Reader]:
    """Every block reads one layer of Llama, each through a projection of its own; the last one reads T5."""
    llama_layers = transformer.config.llama_layers
    spaces = {f"caption_projection.{len(llama_layers)}.linear": "tokens"}
    for i, layer in enumerate(llama_layers):
        spaces[f"caption_projection.{i}.linear"] = layer_space(layer)
    spaces["p_embedder.pooled_embedder.linear_1"] = "pooled"
    return _readers(transformer, spaces)


def _places_in_hidream(transformer: nn.Module) -> dict[str, Place]:
    layers = dict.fromkeys(transformer.config.llama_layers)
    places = {layer_space(i): ("encoder_hidden_states_llama3", i) for i in layers}
    return {"tokens": ("encoder_hidden_states_t5",), **places}


def _find_z_image(transformer: nn.Module) -> dict[str, Reader]:
    if transformer.siglip_embedder is not None:
        raise SiteNotFoundError(
            "This transformer of Z-Image Omni also reads pictures between the tokens of the prompt, which is "
            "not supported yet. Use Z-Image or Z-Image Turbo."
        )
    return _find("cap_embedder.1")(transformer)


def _fixed_latent(model: nn.Module, *shape: int, batch: int) -> Tensor:
    """The same noise for every sample of the batch."""
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).expand(batch, *shape)
    return noise.to(get_module_execution_device(model), model.dtype)


def _image(config: Config) -> tuple[int, ...]:
    """2 × 2 patches of a picture."""
    side = 2 * config.patch_size
    return config.in_channels, side, side


def _sequence(config: Config) -> tuple[int, ...]:
    """The same, already cut into patches."""
    return 4, config.in_channels


def _sizes(config: Config) -> tuple[int, ...]:
    """2 × 2 patches where these have a size for each axis; of a video, one step in time."""
    *time, height, width = config.patch_size
    return config.in_channels, *time, 2 * height, 2 * width


def _kandinsky_video(config: Config) -> tuple[int, ...]:
    """2 × 2 patches of one step in time; with pictures as conditions, these and their mask are channels."""
    frames, height, width = config.patch_size
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    return frames, 2 * height, 2 * width, channels


@dataclass(frozen=True)
class Call:
    """One forward pass of a transformer on fixed noise and the given text."""

    latent: Callable[[Config], tuple[int, ...]]  # `config -> shape` of one sample's latent
    time: float  # the timestep, in the units of the denoiser
    # `(config, text, latent) -> arguments` of `forward` besides latent, timestep, tokens and guidance
    more: Callable[[Config, dict[str, Tensor], Tensor], dict[str, Any]] | None = None

    def __call__(self, transformer: nn.Module, text: dict[str, Tensor]) -> Tensor:
        config, batch = transformer.config, len(text["tokens"])
        latent = _fixed_latent(transformer, *self.latent(config), batch=batch)
        arguments = {
            "timestep": latent.new_full((batch,), self.time),
            "encoder_hidden_states": text["tokens"].to(latent),
        }
        if self.more is not None:
            arguments |= self.more(config, text, latent)
        # distilled models take the guidance scale as an input instead of a second half of the batch
        if getattr(config, "guidance_embeds", False):
            arguments["guidance"] = latent.new_full((batch,), GUIDANCE)
        return transformer(latent, **arguments).sample


def _pooled(text: dict[str, Tensor], width: int, latent: Tensor) -> Tensor:
    """The pooled feature, zero if there is none, on the latent's device and in its dtype."""
    return text.get("pooled", torch.zeros(len(latent), width)).to(latent)


def _sd3_arguments(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    return {"pooled_projections": _pooled(text, config.pooled_projection_dim, latent)}


def _position_ids(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    """Positions of 2 × 2 patches, whose rows and columns the second and third axis count, and of the text."""
    axes, num_tokens = len(config.axes_dims_rope), text["tokens"].shape[1]
    image_ids = latent.new_zeros(4, axes)
    # patches 0 to 3 are at (0, 0), (0, 1), (1, 0) and (1, 1)
    image_ids[2:, 1] = 1
    image_ids[1::2, 2] = 1
    text_ids = latent.new_zeros(num_tokens, axes)
    if axes == 4:  # FLUX.2 counts its tokens
        text_ids[:, 3] = torch.arange(num_tokens)
    return {"img_ids": image_ids, "txt_ids": text_ids}


def _flux_arguments(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    return _sd3_arguments(config, text, latent) | _position_ids(config, text, latent)


def _pixart_arguments(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    size = latent.new_full((len(latent), 2), 1024.0)  # read by models that draw at 1024 pixels
    return {"added_cond_kwargs": {"resolution": size, "aspect_ratio": size[:, :1] / 1024}}


def _qwen_image_arguments(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    arguments: dict[str, Any] = {"img_shapes": [[(1, 2, 2)]] * len(latent)}
    if config.use_additional_t_cond:  # the kind of picture, in Qwen-Image-Layered
        arguments["additional_t_cond"] = torch.zeros(len(latent), dtype=torch.int64, device=latent.device)
    return arguments


def _hunyuan_arguments(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    arguments = {"encoder_attention_mask": latent.new_ones(text["tokens"].shape[:2])}
    if config.use_meanflow:
        arguments["timestep_r"] = latent.new_full((len(latent),), 500.0)
    return arguments


def _lumina_arguments(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    return {"encoder_attention_mask": latent.new_ones(text["tokens"].shape[:2], dtype=torch.bool)}


def _cogview_arguments(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    size = latent.new_full((len(latent), 2), 1024.0)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}


def _kandinsky_arguments(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    return {
        "pooled_projections": _pooled(text, config.in_text_dim2, latent),
        "visual_rope_pos": [torch.arange(count, device=latent.device) for count in (1, 2, 2)],
        "text_rope_pos": torch.arange(text["tokens"].shape[1], device=latent.device),
    }


def _wan_arguments(config: Config, text: dict[str, Tensor], latent: Tensor) -> dict[str, Any]:
    if config.image_dim is None:
        return {}
    # Image-to-video of Wan 2.1 counts the prompt's positions from behind.
    tokens = text["tokens"].to(latent)
    pictures = latent.new_zeros(len(latent), 1, config.image_dim)
    positions = config.pos_embed_seq_len  # of a first and a last picture together
    if positions is not None:
        pictures = latent.new_zeros(2 * len(latent), positions // 2, config.image_dim)
    return {
        "encoder_hidden_states": pad(tokens, (0, 0, 0, WAN_LENGTH - tokens.shape[1])),
        "encoder_hidden_states_image": pictures,
    }


def _call_unet(unet: nn.Module, text: dict[str, Tensor]) -> Tensor:
    config, batch = unet.config, len(text["tokens"])
    # the smallest picture that every block can halve; a group of one channel needs more than one pixel
    side = 2 ** (len(config.block_out_channels) - 1)
    if config.norm_num_groups in config.block_out_channels:
        side *= 2
    latent = _fixed_latent(unet, config.in_channels, side, side, batch=batch)
    labels = None
    # upscalers embed the level of noise in the small picture as a class
    if config.num_class_embeds is not None:
        labels = torch.zeros(batch, dtype=torch.int64, device=latent.device)
    conditions = {}
    if config.encoder_hid_dim_type == "ip_image_proj":
        projections = unet.encoder_hid_proj.image_projection_layers
        conditions["image_embeds"] = [_no_image(projection, latent) for projection in projections]
    if config.addition_embed_type == "text_time":
        conditions["time_ids"] = latent.new_zeros(batch, TIME_IDS)
        conditions["text_embeds"] = _pooled(text, _pooled_width(unet), latent)
    return unet(
        latent,
        torch.tensor(500, device=latent.device),
        encoder_hidden_states=text["tokens"].to(latent),
        class_labels=labels,
        added_cond_kwargs=conditions or None,
    ).sample


def _no_image(projection: nn.Module, latent: Tensor) -> Tensor:
    """The zero embedding of an IP-Adapter's image, in the shape that its projection reads."""
    # The first linear layer tells how wide an image embedding is; single ones have no axis of positions.
    width = next(layer for layer in projection.modules() if isinstance(layer, nn.Linear)).in_features
    positions = (1,) if isinstance(projection, ImageProjection) else (1, 1)
    return latent.new_zeros(len(latent), *positions, width)


def _call_z_image(transformer: nn.Module, text: dict[str, Tensor]) -> Tensor:
    """It takes and returns lists, with an entry for each sample."""
    side = 2 * transformer.config.all_patch_size[0]
    shape = transformer.config.in_channels, 1, side, side
    latent = _fixed_latent(transformer, *shape, batch=len(text["tokens"]))
    times = latent.new_full((len(latent),), 0.5)
    return torch.stack(transformer(list(latent), times, list(text["tokens"].to(latent))).sample)


def _call_hidream(transformer: nn.Module, text: dict[str, Tensor]) -> Tensor:
    config, batch = transformer.config, len(text["tokens"])
    latent = _fixed_latent(transformer, *_image(config), batch=batch)
    # Llama's layers are found by number; those that no block reads are left out.
    layers: list[Tensor | None] = [None] * (max(config.llama_layers) + 1)
    for i in config.llama_layers:
        layers[i] = text[layer_space(i)].to(latent)
    return transformer(
        latent,
        timesteps=latent.new_full((batch,), 500.0),
        encoder_hidden_states_t5=text["tokens"].to(latent),
        encoder_hidden_states_llama3=layers,
        pooled_embeds=_pooled(text, config.text_emb_dim, latent),
    ).sample


# the denoiser's class and a UNet's conditions (see `_conditions`) -> its family
FAMILIES = {
    ("UNet2DConditionModel", None): Family(
        "Stable Diffusion 1.x and 2.x", _find_unet, _call_unet, STABLE_DIFFUSION, kohya={}
    ),
    ("UNet2DConditionModel", "text_time"): Family(
        "Stable Diffusion XL",
        _find_sdxl,
        _call_unet,
        SDXL,
        pooled=("added_cond_kwargs", "text_embeds"),
        # the layer's name in the original checkpoint, which diffusers maps back (tested)
        kohya={"add_embedding.linear_1": "label_emb.0.0"},
    ),
    ("UNet2DConditionModel", "text_time, text_proj"): Family(
        "Kolors", _find_kolors, _call_unet, KOLORS, pooled=("added_cond_kwargs", "text_embeds")
    ),
    ("SD3Transformer2DModel", None): Family(
        "Stable Diffusion 3",
        _find_sd3_or_flux,
        Call(_image, 500.0, _sd3_arguments),
        SD3,
        pooled=("pooled_projections",),
        original={
            "context_embedder.": "context_embedder.",
            "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
        },
    ),
    ("FluxTransformer2DModel", None): Family(
        "FLUX",
        _find_sd3_or_flux,
        Call(_sequence, 0.5, _flux_arguments),
        FLUX,
        pooled=("pooled_projections",),
        original={
            "context_embedder.": "txt_in.",
            "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
        },
    ),
    ("PixArtTransformer2DModel", None): Family(
        "PixArt",
        _find("caption_projection.linear_1"),
        Call(_image, 500.0, _pixart_arguments),
        PIXART,
        lora=False,
        original={"caption_projection.linear_1.": "y_embedder.y_proj.fc1."},
    ),
    ("ZImageTransformer2DModel", None): Family(
        "Z-Image",
        _find_z_image,
        _call_z_image,
        Z_IMAGE,
        norms={"tokens": "cap_embedder.0"},
        joined=True,
        original={"cap_embedder.": "cap_embedder."},
    ),
    ("QwenImageTransformer2DModel", None): Family(
        "Qwen-Image",
        _find("txt_in"),
        Call(_sequence, 0.5, _qwen_image_arguments),
        QWEN_IMAGE,
        norms={"tokens": "txt_norm"},
        original=AS_IN_DIFFUSERS,
    ),
    ("Flux2Transformer2DModel", None): Family(
        "FLUX.2",
        _find("context_embedder"),
        Call(_sequence, 0.5, _position_ids),
        FLUX_2,
        original={"context_embedder.": "txt_in."},
    ),
    ("WanTransformer3DModel", None): Family(
        "Wan 2.1 and 2.2",
        _find("condition_embedder.text_embedder.linear_1"),
        Call(_sizes, 500.0, _wan_arguments),
        ZEROS,
        original={"condition_embedder.text_embedder.linear_1.": "text_embedding.0."},
    ),
    ("ChromaTransformer2DModel", None): Family(
        "Chroma",
        _find("context_embedder"),
        Call(_sequence, 0.5, _position_ids),
        CHROMA,
        original={"context_embedder.": "txt_in."},
    ),
    # the second layer reads the mean of the tokens, with which E commutes
    ("HunyuanImageTransformer2DModel", None): Family(
        "HunyuanImage 2.1",
        _find("context_embedder.proj_in", "context_embedder.time_text_embed.text_embedder.linear_1"),
        Call(_sizes, 500.0, _hunyuan_arguments),
        HUNYUAN_IMAGE,
        lora=False,
        original={
            "context_embedder.proj_in.": "txt_in.input_embedder.",
            "context_embedder.time_text_embed.text_embedder.linear_1.": "txt_in.c_embedder.in_layer.",
        },
    ),
    ("AuraFlowTransformer2DModel", None): Family(
        "AuraFlow",
        _find("context_embedder"),
        Call(_image, 0.5),
        ZEROS,
        original={"context_embedder.": "cond_seq_linear."},
    ),
    ("SanaTransformer2DModel", None): Family(
        "Sana",
        _find("caption_projection.linear_1"),
        Call(_image, 500.0),
        SANA,
        original={"caption_projection.linear_1.": "y_embedder.y_proj.fc1."},
    ),
    ("Lumina2Transformer2DModel", None): Family(
        "Lumina 2",
        _find("time_caption_embed.caption_embedder.1"),
        Call(_image, 0.5, _lumina_arguments),
        LUMINA_2,
        norms={"tokens": "time_caption_embed.caption_embedder.0"},
        original={"time_caption_embed.caption_embedder.": "cap_embedder."},
    ),
    ("CogView4Transformer2DModel", None): Family(
        "CogView4", _find("patch_embed.text_proj"), Call(_image, 500.0, _cogview_arguments), COGVIEW_4
    ),
    ("Kandinsky5Transformer3DModel", None): Family(
        "Kandinsky 5",
        _find("text_embeddings.in_layer", pooled="pooled_text_embeddings.in_layer"),
        Call(_kandinsky_video, 500.0, _kandinsky_arguments),
        KANDINSKY_5,
        pooled=("pooled_projections",),
        original=AS_IN_DIFFUSERS,
    ),
    ("HiDreamImageTransformer2DModel", None): Family(
        "HiDream-I1",
        _find_hidream,
        _call_hidream,
        HIDREAM,
        pooled=("pooled_embeds",),
        places=_places_in_hidream,
        unrecorded_layers="feed-forward experts, each of which reads the tokens that are chosen for it",
        original=AS_IN_DIFFUSERS,
    ),
}


# denoisers that no edit of this kind can erase from -> why
REFUSED = {
    "Krea2Transformer2DModel": "the first layers that read its text add their input to their output, so that "
    "the concept goes around them",
    "GlmImageTransformer2DModel": "the concept comes to it as picture tokens that a language model has "
    "written, not as features of the prompt",
    "OmniGenTransformer2DModel": "it is a language model itself, in which only the table of token embeddings "
    "reads text alone",
}
# keys of `FAMILIES` that `register_family` added, and may replace
_REGISTERED: set[tuple[str, None]] = set()


def unsupported(pipeline: str, parts: Mapping[str, str]) -> str:
    """Say that no part of a pipeline (component -> class) is a denoiser that is known."""
    supported = ", ".join(f"{family.name} ({cls})" for (cls, _), family in FAMILIES.items())
    if reasons := [f"{cls}: {REFUSED[cls]}" for cls in parts.values() if cls in REFUSED]:
        return f"A {pipeline} cannot be edited ({reasons[0]}). Supported denoisers are {supported}."
    classes = ", ".join(f"{name}: {cls}" for name, cls in parts.items())
    return f"{pipeline} is not supported yet. It has {classes}. Supported denoisers are {supported}."


def denoiser_names(pipeline: str, parts: Mapping[str, str]) -> list[str]:
    """
    The components that are denoisers, by the names of classes alone: before any weight is read.

    Raises:
        `SiteNotFoundError`: no class is a denoiser's.
    """
    known = {cls for cls, _ in FAMILIES}
    names = [name for name, cls in parts.items() if cls in known]
    if not names:
        raise SiteNotFoundError(unsupported(pipeline, parts))
    return names


def family_of(module: nn.Module) -> Family | None:
    """The family of a denoiser, `None` for any other module."""
    return FAMILIES.get((type(module).__name__, _conditions(module)))


def _conditions(module: nn.Module) -> str | None:
    """What a UNet adds to its time embedding; and, if one projection reads the text for all layers, that."""
    config = getattr(module, "config", None)
    addition = getattr(config, "addition_embed_type", None)
    projected = getattr(config, "encoder_hid_dim_type", None) == "text_proj"
    # SDXL and Kolors share a class; only Kolors projects the text once for all layers.
    # An IP-Adapter takes the projection's place, and keeps it under this name.
    if addition and (projected or getattr(module, "text_encoder_hid_proj", None)):
        return f"{addition}, text_proj"
    return addition


def register_family(denoiser: str, family: Family, text: Text | None = None) -> None:
    """
    Add a family of denoisers, for this process: every call of this package then treats it like its own.

    The first erasure proves by a run whether `family` names the right layers: a layer that is missing lets
    the concept through, and the call is rolled back and raises.

    Args:
        denoiser (`str`):
            The name of the denoiser's class, in diffusers or in a module of your own.
        family (`Family`):
            Which of its layers read text, and how to call it once.
        text (`Text`, *optional*):
            How the pipeline encodes prompts, unless `family` says so; by default as another family with the
            same text encoders does.

    Raises:
        `SiteNotFoundError`: the package knows this family already.

    Example:

        >>> from more_hf.diffusion.families import Family, Reader, register_family
        >>> def find(transformer):
        ...     return {"context_embedder": Reader(transformer.context_embedder)}
        >>> def call(transformer, text):
        ...     tokens = text["tokens"].to(transformer.device, transformer.dtype)
        ...     latent = tokens.new_ones(len(tokens), 4, transformer.config.in_channels)
        ...     return transformer(latent, encoder_hidden_states=tokens).sample
        >>> register_family("MyTransformer2DModel", Family("My model", find, call))
    """
    # Only a registered family may be replaced: a notebook runs its cells again.
    if any(name == denoiser for name, _ in FAMILIES) and (denoiser, None) not in _REGISTERED:
        raise SiteNotFoundError(f"{denoiser} is supported already. Leave the registration out.")
    FAMILIES[denoiser, None] = family if text is None else replace(family, text=text)
    _REGISTERED.add((denoiser, None))
