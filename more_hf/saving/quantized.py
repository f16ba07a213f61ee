"""Whether a model with quantized layers can be saved so that diffusers loads it again as it is."""

from __future__ import annotations

from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from ..core.errors import ExportError
from ..core.quantized import exempt_list
from ..diffusion.quantized import LAYERWISE_CASTING, is_packed, scheme_of


def check_savable(name: str, part: nn.Module) -> None:
    """
    Raises `ExportError` if the quantized layers of a component would not be loaded again, or if the names of
    those that are plain would make the loader leave others plain as well.
    """
    found = {layer: scheme_of(module) for layer, module in part.named_modules()}
    quantized = {layer: one.name for layer, one in found.items() if one and one is not LAYERWISE_CASTING}
    quantizer = getattr(part, "hf_quantizer", None)
    if quantized and quantizer is None:
        layer, scheme = next(iter(quantized.items()))
        raise ExportError(
            f"`{name}` was quantized after it was loaded (first: `{layer}`, {scheme}), so its configuration "
            "does not say how to load it. Save before you quantize, or load it with a `quantization_config`."
        )
    if not isinstance(quantizer, DiffusersQuantizer):
        return
    if not quantizer.is_serializable:
        raise ExportError(
            f"`{name}` is quantized by {quantizer.quantization_config.quant_method.value}, which diffusers "
            "cannot save. Erase from the unquantized model, or write a LoRA (`more_hf.save_lora`)."
        )
    if packed := [layer for layer in quantized if is_packed(part.get_submodule(layer))]:
        raise ExportError(
            f"`{packed[0]}` of `{name}` was packed by bitsandbytes for this CPU, and is not saved rightly. "
            "Load the model on a GPU, erase, and save."
        )
    config = quantizer.quantization_config
    for plain in getattr(config, exempt_list(config)) or ():
        for layer in quantized:
            if f"{plain}." in f"{layer}.":
                raise ExportError(
                    f"`{name}` cannot be saved: its loader would take the quantized layer `{layer}` for a "
                    f"plain one, since it compares only the part {plain!r} of a name. Load the model with "
                    f"{plain!r} among the modules that are not quantized, erase, and save."
                )
