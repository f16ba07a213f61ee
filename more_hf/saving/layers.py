"""Read only what an edit needs of a saved denoiser: the layers that read text, and the norms before them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import diffusers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from safetensors import safe_open
from torch import Tensor

from ..core.errors import ExportError, IncompatibleBaseError, SiteNotFoundError
from ..diffusion.families import family_of
from ..diffusion.sites import Denoiser
from .files import reading


def read_denoiser(
    folder: Path, name: str, read: Callable[[str], dict[str, Tensor]], *, layers: bool
) -> Denoiser:
    """
    A denoiser of a pipeline's folder on the meta device, with the class and configuration that it was saved
    with.

    Only the norms before the layers that read text are loaded, and with `layers` these layers too; nothing
    else is read from the files. `read` gives the tensors whose names start with a prefix, without it, as
    `read_tensors` does.

    Raises:
        `SiteNotFoundError`: the denoiser's family is unknown. `IncompatibleBaseError`: a file cannot be read.
    """
    place = folder / name
    with reading(place):
        cls = imported_class(read_index(folder)[1][name], ModelMixin)
        with init_empty_weights():
            module = cls.from_config(cls.load_config(place))
        family = family_of(module)
        if family is None:
            raise SiteNotFoundError(
                f"{cls.__name__} is not a denoiser of a supported family. Register its family first, as when "
                "the concept was erased."
            )
        for part in [*family.norms.values(), *(family.find(module) if layers else ())]:
            module.get_submodule(part).load_state_dict(read(f"{part}."), assign=True)
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
    denoisers of Wan, and knows none but the classes of diffusers.
    """
    return imported_class(name, DiffusionPipeline)


def imported_class(name: str, base: type) -> type:
    """
    A class of diffusers, or one derived from `base` in a module that was imported. No file can make this
    import a module.

    Raises:
        `IncompatibleBaseError`: there is none of this name.
    """
    if isinstance(name, str) and hasattr(diffusers, name):
        return getattr(diffusers, name)
    derived = [base]
    for cls in derived:  # which grows
        derived += cls.__subclasses__()
        if cls.__name__ == name and _is_in_module(cls):
            return cls
    raise IncompatibleBaseError(
        f"{name!r} is no class of diffusers, and no module that was imported has it. Import the module that "
        "defines it first (on the command line, `--import MODULE`)."
    )


def require_importable(pipeline: type, parts: Iterable[type]) -> None:
    """
    Raises `ExportError` for a class that is not found under its name in its module, and for a component's
    that diffusers would not load from there.
    """
    for cls in (pipeline, *parts):
        if not _is_in_module(cls):
            raise ExportError(
                f"No other process could open this: {cls.__qualname__} is not found in {cls.__module__}. "
                "Define it at the top of a module, then save."
            )
        module = sys.modules[cls.__module__]
        bases = [getattr(module, name, None) for name in ALL_IMPORTABLE_CLASSES]
        known = cls is pipeline or cls.__module__.split(".")[0] in LOADABLE_CLASSES
        if not known and not any(base and issubclass(cls, base) for base in bases):
            base = "ModelMixin" if issubclass(cls, ModelMixin) else "PreTrainedModel"
            raise ExportError(
                f"diffusers would not open this: it loads {cls.__name__} only if {cls.__module__} also has "
                f"the name {base}. Import {base} there, then save."
            )


def _is_in_module(cls: type) -> bool:
    """Whether the class is found under its name in its module."""
    return getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls


def read_tensors(files: Iterable[Path], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    tensors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.startswith(prefix):
                    tensors[name.removeprefix(prefix)] = file.get_tensor(name)
    return tensors
