"""What reads text in a pipeline: its denoiser, the layers to edit, and what must be refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from diffusers.utils import is_peft_available
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..core.erasure import Site, check_unshared
from ..core.errors import TargetNotFoundError
from .families import FAMILIES, Family, family_of
from .text import text_of


LISTED = 12  # layers that the refusal of an unknown family names


class Denoiser(NamedTuple):
    """A pipeline's denoiser: the component's name, the module (unwrapped from `torch.compile`) and its family."""

    name: str
    module: nn.Module
    family: Family


def find_denoiser(pipe: DiffusionPipeline) -> Denoiser:
    """The pipeline's denoiser.

    Raises `TargetNotFoundError` for an unknown family (with the layers that may read its text), for text encoders that are missing or
    used in an unknown way, and for another component that reads text.
    """
    modules = {name: unwrap_module(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    denoisers = [Denoiser(name, part, family) for name, part in modules.items() if (family := family_of(part)) is not None]
    if len(denoisers) != 1:
        raise TargetNotFoundError(_unknown(pipe, modules, len(denoisers)))
    if denoisers[0].family.pooled and not text_of(pipe).pooled:
        raise TargetNotFoundError(
            f"{type(pipe).__name__} has the denoiser of {denoisers[0].family.name}, which reads a pooled prompt embedding that its text "
            "encoder does not make. Is this the right text encoder?"
        )
    for name, part in modules.items():
        if name != denoisers[0].name and not name.startswith("text_encoder") and _reads_text(part):
            raise TargetNotFoundError(
                f"`{name}` ({type(part).__name__}) reads the prompt with layers of its own and would still know the concept. "
                f"Erase from the pipeline without it (e.g. `StableDiffusionPipeline.from_pipe(pipe)`)."
            )
    return denoisers[0]


def _unknown(pipe: DiffusionPipeline, modules: Mapping[str, nn.Module], found: int) -> str:
    known = ", ".join(f"{family.name} ({cls})" for (cls, _), family in FAMILIES.items())
    classes = ", ".join(f"{name}: {type(part).__name__}" for name, part in modules.items())
    message = f"{type(pipe).__name__} has {found} denoisers of a supported family ({known}). It has {classes}."
    widths = {part.config.hidden_size for name, part in modules.items() if name.startswith("text_encoder")}
    others = [(name, part) for name, part in modules.items() if not name.startswith("text_encoder")]
    layers = [
        f"{name}.{inner}"
        for name, part in others
        for inner, layer in part.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features in widths
    ]
    if layers:
        message += (
            f" {len(layers)} linear layers are as wide as the text encoder's features ({', '.join(map(str, sorted(widths)))}) and may read "
            f"them: {', '.join(layers[:LISTED])}. A family that names the right ones is an entry in `more_hf.diffusion.families.FAMILIES`."
        )
    return message


def _reads_text(part: nn.Module) -> bool:
    """Whether a component beside the denoiser reads the prompt: a ControlNet, for instance."""
    return hasattr(part, "context_embedder") or any(isinstance(m, Attention) and m.is_cross_attention for m in part.modules())


def find_sites(pipe: DiffusionPipeline, denoiser: Denoiser, *, pooled: bool = False) -> dict[str, Site]:
    """Every layer of the denoiser that reads the prompt's tokens, and its pooled feature if `pooled`, checked to be editable.

    Raises `TargetNotFoundError`; changes nothing. A LoRA that is loaded but not fused stays as it is: the site is its base layer.
    """
    if getattr(pipe, "num_fused_loras", 0):
        raise TargetNotFoundError(f"{pipe.num_fused_loras} LoRA(s) are fused. Call `pipe.unfuse_lora()` first, erase, then fuse again.")
    registries = [m.__dict__["_diffusers_hook"] for m in denoiser.module.modules() if "_diffusers_hook" in m.__dict__]
    offloading = filter(None, (registry.get_hook("group_offloading") for registry in registries))
    if any(hook.config.offload_to_disk_path is not None for hook in offloading):
        raise TargetNotFoundError(
            "The denoiser is group-offloaded to disk, where an edit would not reach it. Erase first, then enable offloading to disk."
        )
    readers = denoiser.family.find(denoiser.module)
    if not readers:
        raise TargetNotFoundError(f"{type(denoiser.module).__name__} has no attention that reads text (no layer with cross-attention).")
    sites = {
        name: Site(name, _base_layer(name, reader.module), space=reader.space, columns=reader.columns)
        for name, reader in readers.items()
        if pooled or reader.space == "tokens"
    }
    check_unshared(sites, denoiser.module)
    return sites


def check_widths(sites: Mapping[str, Site], widths: Mapping[str, int]) -> None:
    """Raises `TargetNotFoundError` unless every site reads as many features as its space has."""
    for name, site in sites.items():
        if site.read().shape[1] != widths[site.space]:
            raise TargetNotFoundError(
                f"`{name}` does not read the text encoder's {widths[site.space]} features. Is this the right text encoder?"
            )


def lora_branches(denoiser: Denoiser) -> list[nn.Module]:
    """The sites' LoRA layers: their own weights read the text beside the edited base layer."""
    return [reader.module for reader in denoiser.family.find(denoiser.module).values() if _is_lora(reader.module)]


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
