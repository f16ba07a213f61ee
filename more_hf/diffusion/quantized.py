"""How the libraries that quantize a model store a linear layer's weight, and how to get it back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn

from ..core.errors import SiteNotFoundError
from ..core.quantized import Quantized


CASTING = "layerwise_casting"


class Scheme(NamedTuple):
    """How a library stores a weight."""

    name: str  # the scheme, in words
    # `(layer, dtype) ->` its weight as a plain tensor in the precision in which it computes, which is the
    # model's `dtype` where the library does not say
    dequantize: Callable[[nn.Linear, torch.dtype], Tensor]


def _bitsandbytes_4bit(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _bitsandbytes_8bit(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return int8_vectorwise_dequant(layer.weight.data, scales).to(dtype)


def _torchao(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    return layer.weight.dequantize()


def _quanto(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    return layer.qweight.dequantize()


def _gguf(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(layer.weight).as_subclass(Tensor).to(layer.compute_dtype)


def _cast(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    return layer.weight.data.to(_hooks_of(layer)[CASTING].compute_dtype)


# a layer's class -> how its weight is stored
SCHEMES = {
    "bitsandbytes.nn.modules.Linear4bit": Scheme("bitsandbytes 4-bit", _bitsandbytes_4bit),
    "bitsandbytes.nn.modules.Linear8bitLt": Scheme("bitsandbytes 8-bit", _bitsandbytes_8bit),
    "optimum.quanto.nn.qlinear.QLinear": Scheme("quanto", _quanto),
    "diffusers.quantizers.gguf.utils.GGUFLinear": Scheme("GGUF", _gguf),
}
# these two leave the class as it is
TORCHAO = Scheme("torchao", _torchao)
LAYERWISE_CASTING = Scheme("layerwise casting", _cast)


def scheme_of(layer: nn.Module) -> Scheme | None:
    """How a layer's weight is quantized; `None` if it is not, or in no known way."""
    kind = type(layer)
    if kind is nn.Linear and CASTING in _hooks_of(layer):
        return LAYERWISE_CASTING
    if kind is nn.Linear and type(layer.weight).__module__.startswith("torchao."):
        return TORCHAO
    return SCHEMES.get(f"{kind.__module__}.{kind.__qualname__}")


@torch.no_grad()
def quantized_layer(model: nn.Module, name: str, layer: nn.Module) -> Quantized | None:
    """
    A layer and the plain one that can take its place, with the hooks of accelerate; `None` if its weight is
    not quantized in a known way. Changes nothing.

    Raises:
        `SiteNotFoundError`: the layer is offloaded by itself, or its inputs are quantized too.
    """
    scheme = scheme_of(layer)
    if scheme is None:
        return None
    reasons = {
        "offloaded by itself": layer.weight.is_meta or _hooks_of(layer).keys() - {CASTING},
        "quantized together with its inputs": getattr(layer, "activation_qtype", None) is not None,
        "packed for this CPU by an earlier pass": is_packed(layer),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise SiteNotFoundError(
            f"`{name}` ({scheme.name}) is {reason}, so its weight cannot be read. Load the model again "
            "without that, and erase before anything else."
        )
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    # diffusers' loader for quanto knows the last part of a name alone, the others take the whole name
    exempt = name.rpartition(".")[2] if scheme.name == "quanto" else name
    dense = scheme.dequantize(layer, model.dtype)
    pair = Quantized(model, layer, scheme.name, dense, config=config, exempt=exempt)
    if "_hf_hook" in vars(layer):
        add_hook_to_module(pair.plain, copy.copy(layer._hf_hook))
    return pair


def is_packed(layer: nn.Module) -> bool:
    """
    Whether bitsandbytes packed a 4-bit weight for the CPU in a pass: in version 0.50, unpacking mixes up the
    scales of layers that read more than 64 features.
    """
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return getattr(state, "packing_format_for_cpu", False)


def precision_of(model: nn.Module) -> str:
    """In which precision a model computes and how its weights are quantized, in words."""
    schemes = {scheme.name for layer in model.modules() if (scheme := scheme_of(layer)) is not None}
    return ", ".join([str(model.dtype).removeprefix("torch."), *sorted(schemes)])


def _hooks_of(layer: nn.Module) -> dict[str, object]:
    """Name -> a hook of diffusers on this layer."""
    return getattr(vars(layer).get("_diffusers_hook"), "hooks", {})
