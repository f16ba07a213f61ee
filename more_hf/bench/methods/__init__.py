"""Published methods beside ours, each in one file: for pipelines called like `erase_concept`, for classifiers as `classification` says.

`DIFFUSION` and `CLASSIFICATION` are plain dictionaries, name -> `"module:function"`: importing them imports neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


DIFFUSION = {
    "original": "more_hf.bench.methods.diffusion.controls:original",
    "noise": "more_hf.bench.methods.diffusion.controls:noise",
    "negative_prompt": "more_hf.bench.methods.diffusion.controls:negative_prompt",
    "more": "more_hf.diffusion.erase:erase_concept",
    "more-reloaded": "more_hf.bench.methods.diffusion.ours:more_reloaded",
    "more-erase": "more_hf.diffusion.erase:erase_concept",
    "more-mean": "more_hf.diffusion.erase:erase_concept",
    "more-random": "more_hf.bench.methods.diffusion.ours:more_random",
    "more-hash": "more_hf.bench.methods.diffusion.ours:more_hash",
    "more-without-po": "more_hf.bench.methods.diffusion.without_po:more_without_po",
    "more-erase-without-po": "more_hf.bench.methods.diffusion.without_po:more_without_po",
    "uce": "more_hf.bench.methods.diffusion.uce:uce",
    "rece": "more_hf.bench.methods.diffusion.rece:rece",
    "cure": "more_hf.bench.methods.diffusion.cure:cure",
    "speed": "more_hf.bench.methods.diffusion.speed:speed",
    "oce": "more_hf.bench.methods.diffusion.oce:oce",
    "sld-medium": "more_hf.bench.methods.diffusion.sld:sld_medium",
    "safree": "more_hf.bench.methods.diffusion.safree:safree",
    "esd": "more_hf.bench.methods.diffusion.esd:esd",
    "ca": "more_hf.bench.methods.diffusion.ca:ca",
    "uce-paper": "more_hf.bench.methods.diffusion.uce:uce_paper",
    "sld-weak": "more_hf.bench.methods.diffusion.sld:sld_weak",
    "sld-strong": "more_hf.bench.methods.diffusion.sld:sld_strong",
    "sld-max": "more_hf.bench.methods.diffusion.sld:sld_max",
    "safree-re-attention": "more_hf.bench.methods.diffusion.safree:safree_re_attention",
    "esd-repo": "more_hf.bench.methods.diffusion.esd:esd_repo",
}
"""name -> where `method(pipe, concepts, *, remap_to, retain, **settings) -> pipe` is, in the order of the tables; ours are `more*`."""

CONTROLS = ("original", "noise", "negative_prompt")
"""What every table needs beside the methods: none of them can win."""

APPENDIX = ("uce-paper", "sld-weak", "sld-strong", "sld-max", "safree-re-attention", "esd-repo")
"""Further variants of methods that are in the main table."""

TRAINED = ("esd", "esd-repo", "ca")

WITHOUT_TARGET = ("more-erase", "more-erase-without-po")
SEVERAL_TARGETS = ("more-mean", "more-random", "more-hash")
"""Methods that a benchmark does not tell the one target of the others: no target, or several."""

GROUPS = {
    "all": tuple(name for name in DIFFUSION if name not in APPENDIX),
    "training-free": tuple(name for name in DIFFUSION if name not in (*APPENDIX, *TRAINED)),
    "appendix": APPENDIX,
}
"""Words for several methods at once."""

CLASSIFICATION = {
    "original": "more_hf.bench.methods.classification.original:original",
    "retrain": "more_hf.bench.methods.classification.retrain:retrain",
    "finetune": "more_hf.bench.methods.classification.finetune:finetune",
    "neggrad": "more_hf.bench.methods.classification.neggrad:neggrad",
    "neggrad-plus": "more_hf.bench.methods.classification.neggrad_plus:neggrad_plus",
    "random-labels": "more_hf.bench.methods.classification.random_labels:random_labels",
    "salun": "more_hf.bench.methods.classification.salun:salun",
    "l1-sparse": "more_hf.bench.methods.classification.l1_sparse:l1_sparse",
    "fisher": "more_hf.bench.methods.classification.fisher:fisher",
    "boundary-shrink": "more_hf.bench.methods.classification.boundary_shrink:boundary_shrink",
    "scrub": "more_hf.bench.methods.classification.scrub:scrub",
    "bad-teacher": "more_hf.bench.methods.classification.bad_teacher:bad_teacher",
    "lau": "more_hf.bench.methods.classification.lau:lau",
    "esc": "more_hf.bench.methods.classification.esc:esc",
    "esc-as-released": "more_hf.bench.methods.classification.esc:esc_as_released",
    "esc-t": "more_hf.bench.methods.classification.esc_t:esc_t",
    "esc-t-as-released": "more_hf.bench.methods.classification.esc_t:esc_t_as_released",
    "leace-rest": "more_hf.bench.methods.classification.leace:leace_rest",
    "leace-target": "more_hf.bench.methods.classification.leace:leace_target",
    "erase-without-po": "more_hf.bench.methods.classification.without_po:erase_without_po",
    "remap-without-po": "more_hf.bench.methods.classification.without_po:remap_without_po",
    "erase-without-complement": "more_hf.bench.methods.classification.without_complement:erase_without_complement",
    "remap-without-complement": "more_hf.bench.methods.classification.without_complement:remap_without_complement",
    "erase": "more_hf.bench.methods.classification.ours:erase",
    "remap": "more_hf.bench.methods.classification.ours:remap",
    "more": "more_hf.bench.methods.classification.ours:more",
    "more-hash": "more_hf.bench.methods.classification.ours:more_hash",
    "more-prototype": "more_hf.bench.methods.classification.ours:more_prototype",
    "more-trained": "more_hf.bench.methods.classification.ours:more_trained",
    "more-inner": "more_hf.bench.methods.classification.ours:more_inner",
    "remap-samples": "more_hf.bench.methods.classification.ours:remap_samples",
    "remap-samples-as-printed": "more_hf.bench.methods.classification.ours:remap_samples_as_printed",
}
"""name -> where `method(model, splits, *, seed, **settings) -> model` is, in the order of the tables."""

ABLATIONS = ("erase-without-complement", "remap-without-complement", "more-trained", "more-inner")
"""Entries of `CLASSIFICATION` for `benchmarks/kd/sweep.py`: variants of ours that are in no main table."""

SAMPLES_ONLY = ("remap-samples", "remap-samples-as-printed")
CLASSES_ONLY = (
    *ABLATIONS,
    "leace-rest",
    "leace-target",
    "erase-without-po",
    "remap-without-po",
    "erase",
    "remap",
    "more",
    "more-hash",
    "more-prototype",
)
"""Entries of `CLASSIFICATION` that forget random samples of all classes and nothing else, or whole classes and nothing else."""

CLOSED_FORM = ("esc", "leace-rest", "leace-target", "erase-without-po", "remap-without-po", "erase", "remap", "more", "more-hash")
"""Entries of `CLASSIFICATION` that need one pass over the data and no training."""


def diffusion_baseline(name: str) -> Callable:
    """The function of one entry of `DIFFUSION`. Raises `KeyError` for an unknown name."""
    return _function(DIFFUSION[name])


def classification_baseline(name: str) -> Callable:
    """The function of one entry of `CLASSIFICATION`. Raises `KeyError` for an unknown name."""
    return _function(CLASSIFICATION[name])


def _function(place: str) -> Callable:
    module, name = place.split(":")
    return getattr(import_module(module), name)
