"""The layers that a published method edits, and writing what it computed: all of it or nothing.

Closed forms compute everything in float64 and cast once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from more_hf.core.errors import IncompatibleBaseError
from more_hf.core.interrupts import unless_completed
from more_hf.core.request import check_choice
from more_hf.core.site import Site, copy_weights
from more_hf.core.site import write_weights as write_all
from more_hf.diffusion.sites import check_widths, find_denoiser, find_sites


LAYERS = {"kv": ("to_k", "to_v"), "v": ("to_v",), "k": ("to_k",)}


@dataclass(frozen=True)
class Trained:
    """A parameter that a training changes, with the calls of a `Site`: biases and norms are no sites."""

    parameter: nn.Parameter

    def read(self) -> Tensor:
        return self.parameter.data

    def write(self, value: Tensor) -> None:
        self.parameter.data.copy_(value)


def text_sites(pipe: DiffusionPipeline, layers: str, width: int) -> dict[str, Site]:
    """The layers that read text: keys and values (`"kv"`), or one of them. Changes nothing.

    What reads the pooled embedding of Stable Diffusion XL is not among them.

    Raises:
        `SiteNotFoundError`: where `erase_concept` does, and if a layer does not read features of this
            width.
    """
    check_choice("layers", layers, tuple(LAYERS))
    sites = find_sites(pipe, find_denoiser(pipe))
    sites = {name: site for name, site in sites.items() if name.rsplit(".", 1)[-1] in LAYERS[layers]}
    check_widths(sites, {"tokens": width})
    return sites


def write_weights(
    sites: Mapping[str, Site] | Mapping[str, Trained], values: Mapping[str, Tensor], *, remedy: str = ""
) -> None:
    """Put a new value into every site, in its dtype; all of them or none.

    Raises:
        `IncompatibleBaseError`: if a value is not finite; `remedy` is the next step that the message gives.
    """
    cast = {name: values[name].to(site.read().dtype) for name, site in sites.items()}
    for name, value in cast.items():
        if not torch.isfinite(value).all():
            raise IncompatibleBaseError(
                f"The edited `{name}` is not finite in {value.dtype}. Nothing was changed. {remedy}".rstrip()
            )
    before = copy_weights(sites)
    with unless_completed(partial(write_all, sites, before)):
        write_all(sites, cast)


def multiply(pipe: DiffusionPipeline, A: Tensor, layers: str = "kv") -> None:
    """Replace every W by W A, in place, for one matrix A `(d, d)` of the text space."""
    sites = text_sites(pipe, layers, len(A))
    weights = {name: site.read() for name, site in sites.items()}
    write_weights(sites, {name: W.double() @ A.to(W.device) for name, W in weights.items()})
