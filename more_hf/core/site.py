"""The layers that read the features: which may be edited, and where their weights really live."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SiteNotFoundError
from .quantized import Quantized


EDITABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Exact classes that compute W z + b and nothing else; a subclass may be quantized or wrapped. timm's Linear
# only casts.
PLAIN = ("torch.nn.modules.linear.Linear", "torch.nn.modules.conv.Conv2d", "timm.layers.linear.Linear")


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes W z + b at every position: linear, or a convolution with a 1×1 kernel."""
    if isinstance(module, nn.Conv2d):
        settings = module.kernel_size, module.stride, module.padding, module.groups
        return settings == ((1, 1), (1, 1), (0, 0), 1)
    return isinstance(module, nn.Linear)


def matrix_of(weight: Tensor) -> Tensor:
    """A linear layer's or 1×1 convolution's weight as a matrix `(out, in)`; a view, not a copy."""
    return weight.flatten(1) if weight.ndim == 4 else weight


def feature_dim(module: nn.Module) -> int:
    """The dimension of a layer's input and output that holds features: of a convolution its channels."""
    return 1 if isinstance(module, nn.Conv2d) else -1


class Site:
    """A linear layer that reads the features, and where its weight really lives.

    Under sequential offload the parameter is an empty stand-in on the meta device, and the weight is in the
    `weights_map` of accelerate's hook, or in a file that this names. `read` and `write` go there; everything
    else in the library goes through them. No file is changed: what was on the disk is kept in memory once it
    is edited.

    Args:
        name (`str`):
            The layer's name in the model.
        module (`nn.Module`):
            The layer, one that `is_linear`.
        space (`str`, *optional*, defaults to `"tokens"`):
            Which features the layer reads, if a model has several kinds.
        columns (`int`, *optional*):
            How many leading columns read those features, if not all. `read` and `write` see only these.
        quantized (`Quantized`, *optional*):
            The quantized layer whose place `module` can take.

    Raises:
        `SiteNotFoundError`: the weight cannot be edited in place. The message names the layer and the remedy.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        space: str = "tokens",
        columns: int | None = None,
        quantized: Quantized | None = None,
    ):
        self.name = name
        self.module = module
        self.space = space
        self.columns = columns
        self.quantized = quantized
        self.check()

    @property
    def is_in_place(self) -> bool:
        """Whether the layer itself is in the model, and not a quantized one."""
        return self.quantized is None or self.quantized.is_plain

    def check(self) -> None:
        """Raises `SiteNotFoundError` if the weight cannot be edited in place."""
        where = f"`{self.name}` ({type(self.module).__name__})"
        kind = type(self.module)
        if f"{kind.__module__}.{kind.__qualname__}" not in PLAIN or not is_linear(self.module):
            raise SiteNotFoundError(
                f"{where} is not a plain nn.Linear: it is quantized or wrapped, and its weight cannot be "
                "edited in place. Erase from the unquantized model, save it, and quantize what was saved."
            )
        weight = self._part(self._whole())
        if type(weight).__name__ == "DTensor":
            raise SiteNotFoundError(
                f"The weight of {where} is split over processes (FSDP or tensor parallelism), and an edit "
                "needs the whole matrix. Erase from the whole model, save it, and shard what was saved."
            )
        plain = type(weight) is Tensor and not weight.is_meta and weight.ndim == 2
        if not plain or weight.dtype not in EDITABLE:
            raise SiteNotFoundError(
                f"The weight of {where} is {type(weight).__name__} {weight.dtype} of shape "
                f"{tuple(weight.shape)} on {weight.device}: quantized, cast to fp8, sharded (FSDP, ZeRO-3) "
                "or not loaded. An edit needs the whole matrix in fp16, bf16, fp32 or fp64. Erase from the "
                "full-precision model, save it, and quantize or shard what was saved. A pipeline in a folder "
                "need not be loaded: `more_hf.erase_to_folder`."
            )

    def _offload_map(self, parameter: str) -> tuple[Any, str] | None:
        """The mapping that holds a parameter while it is offloaded, and its key there."""
        hook = self.module.__dict__.get("_hf_hook")
        for single in getattr(hook, "hooks", (hook,)):  # accelerate's SequentialHook holds several
            if not getattr(single, "offload", False):
                continue
            data, key = single.weights_map, parameter
            while hasattr(data, "prefix"):  # PrefixedDataset
                data, key = data.dataset, data.prefix + key
            return data, key
        return None

    def _whole(self, parameter: str = "weight") -> Tensor:
        offload = self._offload_map(parameter)
        return getattr(self.module, parameter).data if offload is None else offload[0][offload[1]]

    def _part(self, weight: Tensor) -> Tensor:
        matrix = matrix_of(weight)
        return matrix if self.columns is None else matrix[:, : self.columns]

    def read(self) -> Tensor:
        """
        The weight, `(out_features, in_features)` or `(out_features, columns)`; not a copy where it is
        resident.
        """
        return self._part(self._whole())

    @property
    def width(self) -> int:
        """How many features the layer reads, those behind its edited columns included."""
        return self._whole().shape[1]

    def read_bias(self) -> Tensor | None:
        """The bias, `(out_features,)`, if the layer has one."""
        return None if self.module.bias is None else self._whole("bias")

    def features(self, rows: Tensor) -> Tensor:
        """
        What the layer reads where its edited part reads these rows `(n, columns)`: `(n, in_features)`, with
        zeros for the rest.
        """
        return nn.functional.pad(rows, (0, self.width - rows.shape[1]))

    def parameters(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer's whole weight and its bias, with `value` in the part that `read` returns."""
        return (value if self.columns is None else self.with_part(value)), self.read_bias()

    def write(self, value: Tensor) -> None:
        """
        Copy values into the weight in place, in its dtype and on its device, so that everything that shares
        it sees them.
        """
        self._write("weight", value)

    @torch.no_grad()
    def _write(self, parameter: str, value: Tensor) -> None:
        whole = self._whole(parameter)
        self._part(whole).copy_(value)
        offload = self._offload_map(parameter)
        if offload is not None:
            data, key = offload
            # A mapping that returns copies needs the new value written back. An OffloadedWeightsLoader has
            # the part that is in memory in its `state_dict`, and looks there first.
            getattr(data, "state_dict", data)[key] = whole

    def with_part(self, value: Tensor) -> Tensor:
        """
        A new tensor: the whole weight `(out_features, in_features)` with `value` in the part that `read`
        returns.
        """
        rest = self._whole()[:, value.shape[1] :]
        return torch.cat([value, rest.to(value)], dim=1)


class AffineSite(Site):
    """A layer whose bias is edited, too, as the last column of its weight: `[W | b]`."""

    def check(self) -> None:
        """See `Site.check`."""
        super().check()
        if self.module.bias is None:
            raise SiteNotFoundError(
                f"`{self.name}` has no bias, in which gates have their thresholds. Pass reach='denoiser'."
            )

    def read(self) -> Tensor:
        """A copy of weight and bias, `(out_features, in_features + 1)`."""
        return torch.cat([super().read(), self._whole("bias")[:, None]], dim=1)

    def read_bias(self) -> None:
        """None beside what `read` returns."""

    def features(self, rows: Tensor) -> Tensor:
        """See `Site.features`; the last column of `rows` is 1."""
        return rows[:, :-1]

    def parameters(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Site.parameters`."""
        return value[:, :-1], value[:, -1]

    def write(self, value: Tensor) -> None:
        """See `Site.write`."""
        weight, bias = self.parameters(value)
        self._write("weight", weight)
        self._write("bias", bias)


def check_unshared(sites: Mapping[str, Site], model: nn.Module) -> None:
    """Raises `SiteNotFoundError` if a site shares its weight with another layer, which would change too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            owners.setdefault(_memory_of(parameter), []).append(name)
    for name, site in sites.items():
        weight = site._whole() if site.is_in_place else site.quantized.layer.weight
        sharing = owners.get(_memory_of(weight), [])
        if len(sharing) > 1:
            raise SiteNotFoundError(
                f"The weight of `{name}` is shared by {sharing}; editing one would edit all of them. "
                "Give each layer its own copy first."
            )


def _memory_of(weight: Tensor) -> int:
    """What two weights have in common if they share memory. torchao's and quanto's own none."""
    plain = type(weight.data) is Tensor
    return weight.untyped_storage().data_ptr() if plain else id(weight)


def copy_weights(sites: Mapping[str, Site], device: str | None = None) -> dict[str, Tensor]:
    """A copy of every site's weight, on its own device unless another is given."""
    return {name: site.read().to(device or site.read().device, copy=True) for name, site in sites.items()}


def write_weights(sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> None:
    """Write a weight into every site."""
    for name, site in sites.items():
        site.write(values[name])


def put_in_place(sites: Mapping[str, Site], plain: Mapping[str, bool] | bool = True) -> None:
    """Put every site into the model in place of its quantized layer, or, where not `plain`, that one back."""
    for name, site in sites.items():
        if site.quantized is not None:
            wanted = plain if isinstance(plain, bool) else plain[name]
            (site.quantized.make_plain if wanted else site.quantized.put_back)()


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].float().contiguous().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()
