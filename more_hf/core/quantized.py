"""A linear layer whose weight is stored quantized, and the plain layer that takes its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Quantized:
    """
    A quantized linear layer of a model, and a plain `nn.Linear` with its dequantized weight, of which one is
    in the model. The quantized one is put back as it was; nothing is ever quantized again.

    Both share their forward and backward hooks. The `scheme` says in words how the weight is stored. The
    `config`, if there is one, is that by which the saved model is loaded again; it then names the plain
    layer, as `exempt`, among those that are not quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Linear,
        scheme: str,
        dense: Tensor,
        *,
        config: Any = None,
        exempt: str = "",
    ):
        self.layer, self.scheme, self.config, self.exempt = layer, scheme, config, exempt
        self.places = [
            (parent, key)
            for parent in model.modules()
            for key, child in parent._modules.items()
            if child is layer
        ]
        self.plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        self.plain.weight = nn.Parameter(dense, requires_grad=False)
        if layer.bias is not None:
            self.plain.bias = nn.Parameter(layer.bias.data.to(dense.dtype), requires_grad=False)
        self.plain.train(layer.training)
        for attribute in vars(self.plain):
            if "_hooks" in attribute:
                vars(self.plain)[attribute] = vars(layer)[attribute]

    @property
    def is_plain(self) -> bool:
        """Whether the plain layer is in the model."""
        return all(parent._modules[key] is self.plain for parent, key in self.places)

    @property
    def extra_bytes(self) -> int:
        """How much more memory the plain weight takes."""
        return self.plain.weight.nbytes - _size(self.layer.weight)

    def make_plain(self) -> None:
        """Put the plain layer into the model."""
        self._exempt(True)
        self._put(self.plain)

    def put_back(self) -> None:
        """Put the quantized layer back, on the device where the plain one is now."""
        device = self.plain.weight.device
        if self.layer.weight.device != device:
            self.layer.to(device)
        self._put(self.layer)
        self._exempt(False)

    def _put(self, layer: nn.Module) -> None:
        for parent, key in self.places:
            parent._modules[key] = layer

    def _exempt(self, exempt: bool) -> None:
        """Name the layer in the configuration among those that are not quantized, or not."""
        if self.config is not None:
            key = exempt_list(self.config)
            others = [other for other in getattr(self.config, key) or () if other != self.exempt]
            setattr(self.config, key, [*others, self.exempt] if exempt else others or None)


def exempt_list(config: Any) -> str:
    """The attribute of a quantization configuration that names the layers which are not quantized."""
    of_bitsandbytes = hasattr(config, "llm_int8_skip_modules")
    return "llm_int8_skip_modules" if of_bitsandbytes else "modules_to_not_convert"


def _size(tensor: Tensor) -> int:
    """The bytes of a tensor, or of those that a tensor of torchao or quanto is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
