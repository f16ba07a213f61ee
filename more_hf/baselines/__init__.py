"""Published methods beside ours, each in one file, each called like `erase_concept`.

`DIFFUSION` is a plain dictionary, name -> `"module:function"`, so that importing it imports neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


DIFFUSION = {
    "original": "more_hf.baselines.diffusion.controls:original",
    "noise": "more_hf.baselines.diffusion.controls:noise",
    "negative_prompt": "more_hf.baselines.diffusion.controls:negative_prompt",
    "more-without-po": "more_hf.baselines.diffusion.without_po:more_without_po",
    "uce": "more_hf.baselines.diffusion.uce:uce",
    "rece": "more_hf.baselines.diffusion.rece:rece",
    "cure": "more_hf.baselines.diffusion.cure:cure",
    "speed": "more_hf.baselines.diffusion.speed:speed",
    "oce": "more_hf.baselines.diffusion.oce:oce",
    "sld-weak": "more_hf.baselines.diffusion.sld:sld_weak",
    "sld-medium": "more_hf.baselines.diffusion.sld:sld_medium",
    "sld-strong": "more_hf.baselines.diffusion.sld:sld_strong",
    "sld-max": "more_hf.baselines.diffusion.sld:sld_max",
    "safree": "more_hf.baselines.diffusion.safree:safree",
    "esd": "more_hf.baselines.diffusion.esd:esd",
    "ca": "more_hf.baselines.diffusion.ca:ca",
}
"""name -> where `method(pipe, concepts, *, remap_to, retain, **settings) -> pipe` is."""


def diffusion_baseline(name: str) -> Callable:
    """The function of one entry of `DIFFUSION`. Raises `KeyError` for an unknown name."""
    module, function = DIFFUSION[name].split(":")
    return getattr(import_module(module), function)
