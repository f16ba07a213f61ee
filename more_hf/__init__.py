"""more_hf: make diffusers pipelines and image classifiers forget, in closed form (MoRE: a mixture of remapping experts)."""

from importlib import import_module


__version__ = "0.1.0"

# name -> module that has it; resolved on first use, so that importing the package costs nothing
_EXPORTS = {
    "AlreadyErasedError": "errors",
    "Erasure": "erasure",
    "ExportError": "errors",
    "IncompatibleBaseError": "errors",
    "MoreError": "errors",
    "PrototypeError": "errors",
    "PrototypeFitter": "prototypes",
    "Prototypes": "prototypes",
    "Remap": "remap",
    "TargetNotFoundError": "errors",
    "collect_prototypes": "classification.features",
    "disabled": "verbs",
    "erase_classes": "classification.erase",
    "erase_concept": "diffusion.erase",
    "get_erasure": "verbs",
    "load": "hub",
    "load_emoji_sd": "data",
    "load_lpips": "data",
    "push_to_hub": "publish",
    "restore": "verbs",
    "routing": "verbs",
    "save": "hub",
    "save_checkpoint": "publish",
    "save_lora": "diffusion.lora",
    "to_adapters": "diffusion.lora",
    "verify": "hub",
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
