"""more_hf: make diffusers pipelines and classifiers forget, in closed form, by remapping experts."""

from importlib import import_module


__version__ = "0.2.0"

# name -> module that has it; resolved on first use, so that importing the package costs nothing
_EXPORTS = {
    "AlreadyErasedError": "core.errors",
    "Erasure": "core.erasure",
    "ExportError": "core.errors",
    "IncompatibleBaseError": "core.errors",
    "MoreError": "core.errors",
    "Pictures": "core.pictures",
    "PrototypeError": "core.errors",
    "PrototypeFitter": "core.prototypes",
    "Prototypes": "core.prototypes",
    "Remap": "core.remap",
    "SiteNotFoundError": "core.errors",
    "collect_prototypes": "classification.features",
    "compare": "api",
    "disabled": "api",
    "erase_classes": "classification.erase",
    "erase_concept": "diffusion.erase",
    "erase_file": "saving.one_file",
    "erase_to_folder": "saving.shards",
    "erase_to_lora": "saving.lora",
    "evaluate": "tuning.evaluate",
    "find_aliases": "diffusion.aliases",
    "get_erasure": "api",
    "load": "saving.folder",
    "load_emoji_sd": "data",
    "load_file": "saving.one_file",
    "push_to_hub": "saving.push",
    "register_family": "diffusion.families",
    "restore": "api",
    "routing": "api",
    "save": "saving.folder",
    "save_checkpoint": "saving.single_file",
    "save_lora": "saving.lora",
    "tune": "tuning.study",
    "verify": "saving.check",
    "verify_file": "saving.one_file",
    "zero_shot_classifier": "classification.zero_shot",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
