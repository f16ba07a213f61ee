"""Read only what an edit needs of a saved denoiser: the layers that read text, and the norms before them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import diffusers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from ..core.errors import SiteNotFoundError
from ..diffusion.families import family_of
from ..diffusion.sites import Denoiser
from .files import reading


def read_denoiser(folder: Path, name: str, files: Sequence[Path], *, layers: bool) -> Denoiser:
    """
    A denoiser on the meta device, with the class and configuration that it was saved with.

    Only the norms before the layers that read text are loaded, and with `layers` these layers too; nothing
    else is read from the files.

    Args:
        folder (`Path`):
            The pipeline's folder.
        name (`str`):
            The denoiser's component name.
        files (`Sequence[Path]`):
            Its safetensors files.
        layers (`bool`):
            Whether to load the layers that read text.

    Raises:
        `SiteNotFoundError`: the denoiser's family is unknown. `IncompatibleBaseError`: a file cannot be read.
    """
    place = folder / name
    with reading(place):
        cls = getattr(diffusers, read_index(folder)[1][name])
        with init_empty_weights():
            module = cls.from_config(cls.load_config(place))
        family = family_of(module)
        if family is None:
            raise SiteNotFoundError(
                f"{cls.__name__} is not a denoiser of a supported family. Register its family first, as when "
                "the concept was erased."
            )
        for part in [*family.norms.values(), *(family.find(module) if layers else ())]:
            module.get_submodule(part).load_state_dict(_tensors_of(files, f"{part}."), assign=True)
    return Denoiser(name, module, family)


def read_index(folder: Path) -> tuple[str, dict[str, str]]:
    """A saved pipeline's class, and the class of each of its components, by name."""
    with reading(folder):
        config = DiffusionPipeline.load_config(folder)
        pairs = {name: value for name, value in config.items() if isinstance(value, list) and value[1]}
        # A component's name is also its folder's, so it may not lead elsewhere.
        return config["_class_name"], {name: cls for name, (_, cls) in pairs.items() if name.isidentifier()}


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """
    A pipeline's own class, which knows which components are optional; `DiffusionPipeline` would load both
    denoisers of Wan.
    """
    return getattr(diffusers, name, DiffusionPipeline)


def _tensors_of(files: Iterable[Path], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    tensors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.startswith(prefix):
                    tensors[name.removeprefix(prefix)] = file.get_tensor(name)
    return tensors
