"""What reads text, per denoiser family. A family is one entry in `FAMILIES`; anything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import (
    Attention,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
)
from diffusers.models.embeddings import ImageProjection
from diffusers.utils import is_peft_available
from diffusers.utils.torch_utils import get_module_execution_device, unwrap_module
from torch import Tensor, nn

from ..erasure import Site, check_unshared
from ..errors import TargetNotFoundError


CUSTOM_DIFFUSION = (
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
)


@dataclass(frozen=True)
class Family:
    """One kind of denoiser.

    Attributes:
        find (`Callable`): denoiser -> `{name: linear layer}`, every layer that reads the text embedding.
        call (`Callable`): `(denoiser, text)` -> output `(batch, ...)`: one forward pass on a fixed input with text `(batch, tokens, d)`.
    """

    find: Callable[[nn.Module], dict[str, nn.Module]]
    call: Callable[[nn.Module, Tensor], Tensor]


def _unet_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """to_k and to_v of every attention that reads text (an IP-Adapter's own projections read images and are left alone)."""
    config = unet.config
    if config.addition_embed_type is not None or config.encoder_hid_dim_type not in (None, "ip_image_proj"):
        raise TargetNotFoundError(
            f"This UNet also reads text through `addition_embed_type={config.addition_embed_type!r}`, "
            f"`encoder_hid_dim_type={config.encoder_hid_dim_type!r}`. Stable Diffusion 1.x and 2.x UNets are supported."
        )
    layers = {}
    for name, module in unet.named_modules():
        if not isinstance(module, Attention) or not module.is_cross_attention:
            continue
        if "to_kv" in module._modules:
            raise TargetNotFoundError(
                f"`{name}` has fused projections, which keep a copy of the original weights and are saved with the model. "
                "Load the pipeline again without `fuse_qkv_projections()`, erase, then fuse."
            )
        if isinstance(module.processor, CUSTOM_DIFFUSION):
            raise TargetNotFoundError(
                f"`{name}` has a Custom Diffusion processor with text projections of its own. "
                "Call `unet.set_default_attn_processor()` first, or erase without it."
            )
        layers[f"{name}.to_k"], layers[f"{name}.to_v"] = module.to_k, module.to_v
    return layers


def _call_unet(unet: nn.Module, text: Tensor) -> Tensor:
    config, batch = unet.config, len(text)
    device = get_module_execution_device(unet)
    side = 2 ** (len(config.block_out_channels) - 1)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, config.in_channels, 2 * side, 2 * side, generator=generator).expand(batch, -1, -1, -1)
    inputs = {"encoder_hidden_states": text.to(device, unet.dtype)}
    if config.num_class_embeds is not None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.int64, device=device)
    if config.encoder_hid_dim_type == "ip_image_proj":
        embeds = []
        for layer in unet.encoder_hid_proj.image_projection_layers:
            width = next(m for m in layer.modules() if isinstance(m, nn.Linear)).in_features
            shape = (batch, 1, width) if isinstance(layer, ImageProjection) else (batch, 1, 1, width)
            embeds.append(torch.zeros(shape, device=device, dtype=unet.dtype))
        inputs["added_cond_kwargs"] = {"image_embeds": embeds}
    return unet(sample.to(device, unet.dtype), torch.tensor(500, device=device), **inputs).sample


FAMILIES = {"UNet2DConditionModel": Family(find=_unet_layers, call=_call_unet)}


class Denoiser(NamedTuple):
    """A pipeline's denoiser: the component's name, the module (unwrapped from `torch.compile`) and its family."""

    name: str
    module: nn.Module
    family: Family


def find_denoiser(pipe: DiffusionPipeline) -> Denoiser:
    """The pipeline's denoiser.

    Raises `TargetNotFoundError` for an unknown family, for a second text encoder, and for another component that reads text.
    """
    modules = {name: unwrap_module(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    denoisers = [name for name, part in modules.items() if type(part).__name__ in FAMILIES]
    if len(denoisers) != 1:
        classes = ", ".join(f"{name}: {type(part).__name__}" for name, part in modules.items())
        raise TargetNotFoundError(
            f"{type(pipe).__name__} has {len(denoisers)} denoisers of a supported family ({', '.join(FAMILIES)}). It has {classes}."
        )
    if "text_encoder_2" in modules:
        raise TargetNotFoundError(f"{type(pipe).__name__} has a second text encoder. Pipelines with one are supported.")
    if modules.get("text_encoder") is None:
        raise TargetNotFoundError(f"{type(pipe).__name__} was loaded without its text encoder, which prototypes are made with.")
    for name, part in modules.items():
        if name in denoisers or name == "text_encoder":
            continue
        if any(isinstance(m, Attention) and m.is_cross_attention for m in part.modules()):
            raise TargetNotFoundError(
                f"`{name}` ({type(part).__name__}) reads the prompt through cross-attention of its own and would still know the concept. "
                f"Erase from the pipeline without it (e.g. `StableDiffusionPipeline.from_pipe(pipe)`)."
            )
    module = modules[denoisers[0]]
    return Denoiser(denoisers[0], module, FAMILIES[type(module).__name__])


def find_sites(pipe: DiffusionPipeline, denoiser: Denoiser) -> dict[str, Site]:
    """Every layer of the denoiser that reads text, checked to be editable. Raises `TargetNotFoundError`; changes nothing.

    A LoRA that is loaded but not fused stays as it is: the site is its base layer.
    """
    if getattr(pipe, "num_fused_loras", 0):
        raise TargetNotFoundError(f"{pipe.num_fused_loras} LoRA(s) are fused. Call `pipe.unfuse_lora()` first, erase, then fuse again.")
    registries = [m.__dict__["_diffusers_hook"] for m in denoiser.module.modules() if "_diffusers_hook" in m.__dict__]
    offloading = filter(None, (registry.get_hook("group_offloading") for registry in registries))
    if any(hook.config.offload_to_disk_path is not None for hook in offloading):
        raise TargetNotFoundError(
            "The denoiser is group-offloaded to disk, where an edit would not reach it. Erase first, then enable offloading to disk."
        )
    layers = denoiser.family.find(denoiser.module)
    if not layers:
        raise TargetNotFoundError(f"{type(denoiser.module).__name__} has no attention that reads text (no layer with cross-attention).")
    sites = {name: Site(name, _base_layer(name, layer)) for name, layer in layers.items()}
    check_unshared(sites, denoiser.module)
    return sites


def lora_branches(denoiser: Denoiser) -> list[nn.Module]:
    """The sites' LoRA layers: their own weights read the text beside the edited base layer."""
    return [layer for layer in denoiser.family.find(denoiser.module).values() if _is_lora(layer)]


def _is_lora(layer: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def _base_layer(name: str, layer: nn.Module) -> nn.Module:
    if not _is_lora(layer):
        return layer
    if layer.merged:
        raise TargetNotFoundError(f"`{name}` has a merged LoRA. Call `pipe.unfuse_lora()` first, erase, then fuse again.")
    return layer.get_base_layer()
