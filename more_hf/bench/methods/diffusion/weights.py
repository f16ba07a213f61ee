"""Reading and writing the layers that a closed-form baseline edits. Everything is computed in float64 and cast once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ....core.erasure import Site, written
from ....core.errors import IncompatibleBaseError, MoreError
from ....diffusion.sites import check_widths, find_denoiser, find_sites


LAYERS = {"kv": ("to_k", "to_v"), "v": ("to_v",), "k": ("to_k",)}


def text_sites(pipe: DiffusionPipeline, layers: str, width: int) -> dict[str, Site]:
    """The layers that read text: keys and values (`"kv"`), or one of them. Changes nothing.

    What reads the pooled embedding of Stable Diffusion XL is not among them. Raises `TargetNotFoundError` where `erase_concept` does,
    and if a layer does not read features of this width.
    """
    if layers not in LAYERS:
        raise MoreError(f"Unknown layers {layers!r}. Choose one of {', '.join(map(repr, LAYERS))}.")
    sites = find_sites(pipe, find_denoiser(pipe))
    sites = {name: site for name, site in sites.items() if name.rsplit(".", 1)[-1] in LAYERS[layers]}
    check_widths(sites, {"tokens": width})
    return sites


def write_weights(sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> None:
    """Put a new weight `(out, d)` into every site, in its dtype; all of them or none. Raises `IncompatibleBaseError`."""
    cast = {name: values[name].to(site.read().dtype) for name, site in sites.items()}
    if bad := [name for name, value in cast.items() if not torch.isfinite(value).all()]:
        raise IncompatibleBaseError(f"The edited weight of `{bad[0]}` is not finite in {cast[bad[0]].dtype}. Nothing was changed.")
    with written(sites, cast, keep=True):
        pass


def multiply(pipe: DiffusionPipeline, matrix: Tensor, layers: str = "kv") -> None:
    """Replace every W by W A, in place, for one matrix A `(d, d)` of the text space."""
    sites = text_sites(pipe, layers, len(matrix))
    write_weights(sites, {name: site.read().double() @ matrix.to(site.read().device) for name, site in sites.items()})
