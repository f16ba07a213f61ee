"""The denoiser families: which layers read text, and how to call the model once. A family is one entry in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import (
    Attention,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
)
from diffusers.models.embeddings import ImageProjection
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from ..core.errors import SiteNotFoundError


CUSTOM_DIFFUSION = (
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
)
# other ways of a UNet to be conditioned, and the values that are understood here
CONDITIONS = {"encoder_hid_dim_type": (None, "ip_image_proj"), "class_embed_type": (None,), "attention_type": ("default",)}
TIME_IDS = 6  # sizes and crop of Stable Diffusion XL, embedded behind the pooled text


class Reader(NamedTuple):
    """A layer that reads text: the module, the space that it reads, and how many of its first columns do if not all."""

    module: nn.Module
    space: str = "tokens"
    columns: int | None = None


@dataclass(frozen=True)
class Family:
    """One kind of denoiser.

    Attributes:
        name (`str`): as people know it.
        find (`Callable`): denoiser -> `{name: Reader}`, every layer that reads text.
        call (`Callable`): `(denoiser, {space: features})` -> output `(batch, ...)`: one forward pass on a fixed input. Without
            `"pooled"` that feature is zero.
        pooled (`tuple[str, ...]`): where the pooled feature is among the arguments of `forward`: a name, and a key in it.
    """

    name: str
    find: Callable[[nn.Module], dict[str, Reader]]
    call: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    pooled: tuple[str, ...] = ()


def _find_unet(unet: nn.Module) -> dict[str, Reader]:
    """to_k and to_v of every attention that reads text (an IP-Adapter's own projections read images and are left alone)."""
    for option, understood in CONDITIONS.items():
        if unet.config[option] not in understood:
            raise SiteNotFoundError(
                f"This UNet also reads its conditions through `{option}={unet.config[option]!r}`. Only plain Stable Diffusion UNets "
                "and Stable Diffusion XL's are supported."
            )
    layers = {}
    for name, module in unet.named_modules():
        if not isinstance(module, Attention) or not module.is_cross_attention:
            continue
        if "to_kv" in module._modules:
            raise SiteNotFoundError(
                f"`{name}` has fused projections, which keep a copy of the original weights and are saved with the model. "
                "Load the pipeline again without `fuse_qkv_projections()`, erase, then fuse."
            )
        if isinstance(module.processor, CUSTOM_DIFFUSION):
            raise SiteNotFoundError(
                f"`{name}` has a Custom Diffusion processor with text projections of its own. "
                "Call `unet.set_default_attn_processor()` first, or erase without it."
            )
        layers[f"{name}.to_k"], layers[f"{name}.to_v"] = Reader(module.to_k), Reader(module.to_v)
    return layers


def _find_sdxl(unet: nn.Module) -> dict[str, Reader]:
    """As above, and the columns of `add_embedding.linear_1` in front of those that read the time ids."""
    width = unet.config.projection_class_embeddings_input_dim - TIME_IDS * unet.config.addition_time_embed_dim
    return {**_find_unet(unet), "add_embedding.linear_1": Reader(unet.add_embedding.linear_1, "pooled", width)}


def _find_joint(transformer: nn.Module) -> dict[str, Reader]:
    """Stable Diffusion 3 and FLUX read text once, before all blocks."""
    return {
        "context_embedder": Reader(transformer.context_embedder),
        "time_text_embed.text_embedder.linear_1": Reader(transformer.time_text_embed.text_embedder.linear_1, "pooled"),
    }


def _find_pixart(transformer: nn.Module) -> dict[str, Reader]:
    return {"caption_projection.linear_1": Reader(transformer.caption_projection.linear_1)}


def _noise(model: nn.Module, *shape: int, batch: int) -> Tensor:
    """The same latent for every sample of the batch."""
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).expand(batch, *shape)
    return noise.to(get_module_execution_device(model), model.dtype)


def _like(noise: Tensor, text: dict[str, Tensor], width: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and pooled feature (zero, of this width, if there is none) on the latent's device and in its dtype."""
    pooled = text.get("pooled", torch.zeros(len(noise), width))
    return text["tokens"].to(noise), pooled.to(noise)


def _call_unet(unet: nn.Module, text: dict[str, Tensor]) -> Tensor:
    config, batch = unet.config, len(text["tokens"])
    side = 2 ** len(config.block_out_channels)
    sample = _noise(unet, config.in_channels, side, side, batch=batch)
    inputs, added = {}, {}
    if config.num_class_embeds is not None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.int64, device=sample.device)
    if config.encoder_hid_dim_type == "ip_image_proj":
        added["image_embeds"] = []
        for layer in unet.encoder_hid_proj.image_projection_layers:
            width = next(m for m in layer.modules() if isinstance(m, nn.Linear)).in_features
            shape = (batch, 1, width) if isinstance(layer, ImageProjection) else (batch, 1, 1, width)
            added["image_embeds"].append(sample.new_zeros(shape))
    width = 0
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        added["time_ids"] = sample.new_zeros(batch, TIME_IDS)
    tokens, pooled = _like(sample, text, width)
    if width:
        added["text_embeds"] = pooled
    time = torch.tensor(500, device=sample.device)
    return unet(sample, time, encoder_hidden_states=tokens, added_cond_kwargs=added or None, **inputs).sample


def _call_sd3(transformer: nn.Module, text: dict[str, Tensor]) -> Tensor:
    config, batch = transformer.config, len(text["tokens"])
    sample = _noise(transformer, config.in_channels, 2 * config.patch_size, 2 * config.patch_size, batch=batch)
    tokens, pooled = _like(sample, text, config.pooled_projection_dim)
    return transformer(
        hidden_states=sample, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=sample.new_full((batch,), 500.0)
    ).sample


def _call_flux(transformer: nn.Module, text: dict[str, Tensor]) -> Tensor:
    config, batch = transformer.config, len(text["tokens"])
    sample = _noise(transformer, 4, config.in_channels, batch=batch)
    tokens, pooled = _like(sample, text, config.pooled_projection_dim)
    return transformer(
        hidden_states=sample,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        timestep=sample.new_full((batch,), 0.5),
        img_ids=torch.tensor([[0.0, i, j] for i in (0, 1) for j in (0, 1)]).to(sample),
        txt_ids=sample.new_zeros(tokens.shape[1], 3),
        guidance=sample.new_full((batch,), 3.5) if config.guidance_embeds else None,
    ).sample


def _call_pixart(transformer: nn.Module, text: dict[str, Tensor]) -> Tensor:
    config, batch = transformer.config, len(text["tokens"])
    sample = _noise(transformer, config.in_channels, 2 * config.patch_size, 2 * config.patch_size, batch=batch)
    added = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        added = {"resolution": sample.new_full((batch, 2), 1024.0), "aspect_ratio": sample.new_ones(batch, 1)}
    tokens, _ = _like(sample, text)
    return transformer(sample, encoder_hidden_states=tokens, timestep=sample.new_full((batch,), 500.0), added_cond_kwargs=added).sample


# the denoiser's class and its `addition_embed_type` -> its family
FAMILIES = {
    ("UNet2DConditionModel", None): Family("Stable Diffusion 1.x and 2.x", _find_unet, _call_unet),
    ("UNet2DConditionModel", "text_time"): Family("Stable Diffusion XL", _find_sdxl, _call_unet, ("added_cond_kwargs", "text_embeds")),
    ("SD3Transformer2DModel", None): Family("Stable Diffusion 3", _find_joint, _call_sd3, ("pooled_projections",)),
    ("FluxTransformer2DModel", None): Family("FLUX", _find_joint, _call_flux, ("pooled_projections",)),
    ("PixArtTransformer2DModel", None): Family("PixArt", _find_pixart, _call_pixart),
}


def family_of(module: nn.Module) -> Family | None:
    """The family of a denoiser, `None` for any other module."""
    return FAMILIES.get((type(module).__name__, getattr(getattr(module, "config", None), "addition_embed_type", None)))
