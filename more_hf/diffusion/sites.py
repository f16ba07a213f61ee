"""What reads text in a pipeline: its denoiser, the layers to edit, and what must be refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.hooks import ModelHook
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.auto_pipeline import (
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    AUTO_TEXT2VIDEO_PIPELINES_MAPPING,
)
from diffusers.utils import is_peft_available
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..core.errors import SiteNotFoundError
from ..core.record import TOGETHER, prefixes_of
from ..core.site import Site, check_unshared
from .families import FAMILIES, REFUSED, Family, Place, Reader, family_of, unsupported
from .quantized import quantized_layer
from .text import Text


# hooks of diffusers that change where weights are, and not what is computed
HARMLESS_HOOKS = {
    "group_offloading",
    "layer_execution_tracker",
    "lazy_prefetch_group_offloading",
    "layerwise_casting",
    "peft_autocast_disable",
}
SHARDED = {"FSDPModule", "FullyShardedDataParallel"}  # what torch makes a model of several processes of
LISTED = 12  # how many layers the refusal of an unknown family names


class Denoiser(NamedTuple):
    """
    A pipeline's denoiser: the component's name, the module (out of `torch.compile`) and its family.

    Two that take turns, as in Wan 2.2, are one here: the names joined by `+`, the modules in an
    `nn.ModuleDict`, so that every layer's name begins with its component's.
    """

    name: str
    module: nn.Module
    family: Family

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Component -> module: one, or those that take turns."""
        return dict(self.module.items()) if TOGETHER in self.name else {self.name: self.module}

    @property
    def prefixes(self) -> dict[str, str]:
        """Component -> what stands in front of its layers' names."""
        return prefixes_of(self.name)

    @property
    def places(self) -> dict[str, Place]:
        """Where each space of tokens is among the arguments of `forward`."""
        return self.family.places(next(iter(self.parts.values())))

    @property
    def routed_places(self) -> dict[str, Place]:
        """Where each space that a routing hook changes is among the arguments of `forward`."""
        return {**self.places, "pooled": self.family.pooled}

    def find(self) -> dict[str, Reader]:
        """Every layer that reads text. Raises `SiteNotFoundError` as its family does."""
        readers = {}
        for component, prefix in self.prefixes.items():
            found = self.family.find(self.parts[component])
            readers |= {prefix + name: reader for name, reader in found.items()}
        return readers


def as_one_denoiser(denoisers: Sequence[Denoiser], pipeline: str) -> Denoiser:
    """
    The denoisers of a pipeline as one; one alone stays as it is.

    Raises:
        `SiteNotFoundError`: they do not read the same features, and need prototypes of their own.
    """
    if len(denoisers) == 1:
        return denoisers[0]
    family = denoisers[0].family
    if family.norms or any(other.family is not family for other in denoisers):
        raise SiteNotFoundError(
            f"{pipeline} has {len(denoisers)} denoisers that read the prompt in ways of their own, behind "
            "norms or as different families, and an edit of one would leave the concept in the others. Erase "
            "from a pipeline with one of them, then from one with the other; both are edited in place, and "
            "`save_pretrained` of the pipeline that has them writes both."
        )
    modules = {denoiser.name: denoiser.module for denoiser in denoisers}
    names = sorted(modules)
    return Denoiser(TOGETHER.join(names), nn.ModuleDict({name: modules[name] for name in names}), family)


def as_pipeline(pipe: DiffusionPipeline | ModularPipeline) -> DiffusionPipeline:
    """
    A modular pipeline's components in the text-to-image pipeline of the same model; any other pipeline as it
    is.

    Raises:
        `SiteNotFoundError`: this is no pipeline, or a modular one of a model without such a pipeline.
    """
    if isinstance(pipe, DiffusionPipeline):
        return pipe
    if not isinstance(pipe, ModularPipeline):
        raise SiteNotFoundError(
            f"A {type(pipe).__name__} is neither a pipeline of diffusers nor an image classifier "
            "(nn.Module). Pass the pipeline or the classifier itself."
        )
    classes = {**AUTO_TEXT2VIDEO_PIPELINES_MAPPING, **AUTO_TEXT2IMAGE_PIPELINES_MAPPING}
    cls = classes.get(pipe.blocks.model_name)
    if cls is None:
        raise SiteNotFoundError(
            f"diffusers has no text-to-image pipeline for the {pipe.blocks.model_name!r} of this "
            f"{type(pipe).__name__}, whose prompts are encoded as it does. Erase from a pipeline with the "
            "same components, which are edited in place."
        )
    wanted = list(inspect.signature(cls.__init__).parameters.values())[1:]
    parts = {one.name: pipe.components.get(one.name) for one in wanted if one.default is one.empty}
    return cls(**parts)


def find_denoiser(pipe: DiffusionPipeline, absent: Mapping[str, nn.Module] | None = None) -> Denoiser:
    """
    Find the pipeline's denoiser; `absent` has components that the pipeline was loaded without.

    Raises:
        `SiteNotFoundError`: its family is unknown (the message names the layers that may read its text), text
        encoders are missing or used in an unknown way, another component reads text, or several denoisers do
        in ways of their own.
    """
    pipe = as_pipeline(pipe)
    modules = {}
    for name, part in {**pipe.components, **(absent or {})}.items():
        if isinstance(part, nn.Module):
            modules[name] = unwrap_module(part)
    _refuse_sharded(modules)
    families = {name: family_of(part) for name, part in modules.items()}
    denoisers = [
        Denoiser(name, modules[name], family) for name, family in families.items() if family is not None
    ]
    if not denoisers:
        raise SiteNotFoundError(_unsupported(pipe, modules))
    denoiser = as_one_denoiser(denoisers, type(pipe).__name__)
    if _is_offloaded_to_disk(denoiser.module):
        raise SiteNotFoundError(
            "The denoiser is group-offloaded to disk, where its weights can be neither read nor edited. Load "
            "the pipeline without it, erase (or restore, or save), then enable offloading to an empty "
            "folder: diffusers takes the files that are there, which can be the original's."
        )
    if denoiser.family.pooled and not text_of(pipe, denoiser).pooled:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} has the denoiser of {denoiser.family.name}, which reads a pooled prompt "
            "embedding that its text encoder does not make. Check that this is the right text encoder."
        )
    # Whatever else reads the prompt, such as a ControlNet, would still know the concept.
    for name, part in modules.items():
        if name in denoiser.parts or name.startswith("text_encoder"):
            continue
        if _reads_text(part, denoiser):
            raise SiteNotFoundError(
                f"`{name}` ({type(part).__name__}) also reads the prompt, by layers of its own that would "
                "still know the concept or by the denoiser's. Erase from the pipeline without it (e.g. "
                "`StableDiffusionPipeline.from_pipe(pipe)`)."
            )
    return denoiser


def _refuse_sharded(modules: Mapping[str, nn.Module]) -> None:
    for name, part in modules.items():
        if not name.startswith("text_encoder") and SHARDED & {base.__name__ for base in type(part).__mro__}:
            raise SiteNotFoundError(
                f"`{name}` ({type(part).__name__}) is sharded by FSDP: each process holds a part of every "
                "weight, and an edit needs them whole. Erase from the whole model, save it, and shard what "
                "was saved."
            )


def text_of(pipe: DiffusionPipeline, denoiser: Denoiser) -> Text:
    """
    How the pipeline encodes prompts for its denoiser.

    Raises:
        `SiteNotFoundError`: a text encoder is missing, or the way to encode prompts is not known.
    """
    if pipe.config.get("requires_aesthetics_score"):
        raise SiteNotFoundError(
            f"{type(pipe).__name__} holds the refiner of Stable Diffusion XL, which reads prompts with one "
            "text encoder and embeds five sizes instead of six. It is not supported yet. Erase from the base "
            "pipeline, and refine without the concept's name."
        )
    encoders = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    if missing := [name for name, part in encoders.items() if part is None]:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} was loaded without its text encoder `{missing[0]}`, which prototypes are "
            "made with. What it says to the model would stay. Load the pipeline with all of its text "
            "encoders."
        )
    classes = tuple(type(unwrap_module(encoders[name])).__name__ for name in sorted(encoders))
    texts = [family.text for family in FAMILIES.values() if family.text is not None]
    known = {text.encoders: text for text in texts if text.encoders}
    text = denoiser.family.text or known.get(classes)
    if text is not None and text.encoders not in ((), classes):
        raise SiteNotFoundError(
            f"{type(pipe).__name__} has the denoiser of {denoiser.family.name}, which reads prompts of "
            f"{' + '.join(text.encoders)}, and encodes them with {' + '.join(classes) or 'nothing'}. Check "
            "that this is the right text encoder."
        )
    if text is None:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} reads prompts with {' + '.join(classes) or 'no text encoder'}, which is "
            f"not supported yet. Supported are {'; '.join(map(' + '.join, known))}. To add it, describe how "
            "its prompts are encoded in a call of `more_hf.register_family`."
        )
    parameters = inspect.signature(pipe.encode_prompt).parameters if hasattr(pipe, "encode_prompt") else {}
    if missing := [argument for argument in text.arguments if argument not in parameters]:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} encodes prompts in its own way (its `encode_prompt` takes no "
            f"`{missing[0]}`), so what its denoiser reads is not known. Erase from the model's text-to-image "
            "pipeline, and pass its components on."
        )
    return text.fitted(pipe, denoiser.places)


def _unsupported(pipe: DiffusionPipeline, modules: Mapping[str, nn.Module]) -> str:
    """
    The refusal of an unknown family: what is supported, which layers may read text, and how to add the
    family.
    """
    message = unsupported(type(pipe).__name__, {name: type(part).__name__ for name, part in modules.items()})
    if any(type(part).__name__ in REFUSED for part in modules.values()):
        return message
    encoders = [part for name, part in modules.items() if name.startswith("text_encoder")]
    configs = [encoder.config.get_text_config() for encoder in encoders if hasattr(encoder, "config")]
    widths = {config.hidden_size for config in configs if hasattr(config, "hidden_size")}

    # candidates: layers as wide as the text, in models of diffusers that do not turn latents into images
    layers = []
    for name, part in modules.items():
        if isinstance(part, ModelMixin) and not hasattr(part, "decode"):
            layers += [
                f"{name}.{inner}" for inner, layer in part.named_modules() if _is_as_wide(layer, widths)
            ]
    if layers:
        message += (
            f" {len(layers)} linear layers are as wide as the text encoder's features "
            f"({', '.join(map(str, sorted(widths)))}) and may read them: {', '.join(layers[:LISTED])}."
        )
    return message + (
        " To add this family, name the layers that read text, and how to call the denoiser once, in a call "
        "of `more_hf.register_family`."
    )


def _is_as_wide(layer: nn.Module, widths: set[int]) -> bool:
    return isinstance(layer, nn.Linear) and layer.in_features in widths


def _reads_text(part: nn.Module, denoiser: Denoiser) -> bool:
    """
    Whether a component other than the denoiser reads the prompt: a ControlNet, for instance, whose layers
    have the names of the denoiser's.
    """
    own = [name for module in denoiser.parts.values() for name in denoiser.family.find(module)]
    names = tuple(f".{name}" for name in own)
    return any(
        f".{name}".endswith(names) or (isinstance(module, Attention) and module.is_cross_attention)
        for name, module in part.named_modules()
    )


def find_layers(denoiser: Denoiser, *, pooled: bool) -> dict[str, Reader]:
    """
    Every layer of the denoiser that reads the prompt's tokens, and its pooled feature if `pooled`; under a
    LoRA the base.

    Raises:
        `SiteNotFoundError`: there is none, or their projections are fused.
    """
    readers = denoiser.find()
    if not readers:
        raise SiteNotFoundError(
            f"{type(denoiser.module).__name__} has no attention that reads text (no layer with "
            "cross-attention). Pass a text-to-image pipeline."
        )
    return {
        name: reader._replace(module=base_layer(reader.module))
        for name, reader in readers.items()
        if pooled or reader.space != "pooled"
    }


def find_sites(pipe: DiffusionPipeline, denoiser: Denoiser, *, pooled: bool = False) -> dict[str, Site]:
    """
    The layers of `find_layers`, checked to be editable. Changes nothing.

    A LoRA that is loaded but not fused stays as it is: the site is its base layer. One that was fused and
    unloaded is part of the weights.

    Raises:
        `SiteNotFoundError`: a layer cannot be edited in place; the message has the remedy.
    """
    # diffusers goes on counting those that were fused and unloaded, which are part of plain weights
    if getattr(pipe, "num_fused_loras", 0) and any(map(is_lora, denoiser.module.modules())):
        raise SiteNotFoundError(
            f"{pipe.num_fused_loras} LoRA(s) are fused. Call `pipe.unfuse_lora()` first, erase, then fuse "
            "again; or `pipe.unload_lora_weights()`, which leaves them in the weights for good."
        )
    if changing := sorted(_hooks_of(denoiser.module).keys() - HARMLESS_HOOKS):
        raise SiteNotFoundError(
            f"The denoiser has hooks of diffusers that decide which blocks run ({', '.join(changing)}), so "
            "that a run proves nothing. Call `disable_cache()` on it, erase, and enable the cache again."
        )
    for name, reader in denoiser.find().items():
        if is_lora(reader.module) and reader.module.merged:
            raise SiteNotFoundError(
                f"`{name}` has a merged LoRA. Call `pipe.unfuse_lora()` first, erase, then fuse again."
            )
    sites = {}
    for name, (module, space, columns) in find_layers(denoiser, pooled=pooled).items():
        component = next(part for part, prefix in denoiser.prefixes.items() if name.startswith(prefix))
        own_name = name.removeprefix(denoiser.prefixes[component])
        quantized = quantized_layer(denoiser.parts[component], own_name, module)
        plain = module if quantized is None else quantized.plain
        sites[name] = Site(name, plain, space=space, columns=columns, quantized=quantized)
    check_unshared(sites, denoiser.module)
    return sites


def _hooks_of(model: nn.Module) -> dict[str, ModelHook]:
    """Name -> a hook of diffusers of that name in the model."""
    registries = [module.__dict__.get("_diffusers_hook") for module in model.modules()]
    return {name: hook for registry in registries if registry for name, hook in registry.hooks.items()}


def _is_offloaded_to_disk(model: nn.Module) -> bool:
    hook = _hooks_of(model).get("group_offloading")
    return hook is not None and hook.config.offload_to_disk_path is not None


def check_widths(sites: Mapping[str, Site], widths: Mapping[str, int]) -> None:
    """Raises `SiteNotFoundError` unless every site reads as many features as its space has."""
    for name, site in sites.items():
        if site.read().shape[1] != widths[site.space]:
            raise SiteNotFoundError(
                f"`{name}` does not read the text encoder's {widths[site.space]} features. "
                "Check that this is the right text encoder."
            )


def lora_branches(denoiser: Denoiser) -> list[nn.Module]:
    """The sites' LoRA layers: their own weights read the text next to the edited base layer."""
    return [reader.module for reader in denoiser.find().values() if is_lora(reader.module)]


def is_lora(layer: nn.Module) -> bool:
    """Whether a layer is a LoRA around another one."""
    if not is_peft_available():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer itself, under a LoRA its base."""
    return layer.get_base_layer() if is_lora(layer) else layer
