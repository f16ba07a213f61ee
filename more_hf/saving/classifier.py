"""Classifiers in `more_hf.save` and `more_hf.load`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..classification.erasure import ClassErasure
from ..classification.features import plain_model
from ..classification.heads import find_module
from ..classification.hook import make_hooks
from ..classification.kinds import class_of
from ..core.erasure import Erasure
from ..core.errors import ExportError
from ..core.hook import attach_hooks
from ..core.record import Record
from ..core.registry import register
from ..core.site import Site
from .check import require_saved_weights
from .delta import read_delta, read_router


def savable_classifier(model: nn.Module, erasure: Erasure) -> PreTrainedModel:
    """The classifier inside DDP or `torch.compile`. Raises `ExportError` if it cannot be saved erased."""
    model = plain_model(model)
    if erasure.request.at is not None:
        raise ExportError(
            f"Only a hook on `{erasure.request.at}` forgets the classes; the weights are the original's, and "
            "saving would publish them. Erase at the head (leave `at` out) to get a model that can be saved."
        )
    if not isinstance(model, PreTrainedModel):
        raise ExportError(
            f"{type(model).__name__} is not a model of Transformers, and has no `save_pretrained`. Its "
            "weights are the erased ones: save its `state_dict()`, or wrap a timm model in "
            "`TimmWrapperForImageClassification` first."
        )
    return model


def load_classifier(
    source: str | os.PathLike, folder: Path, record: Record, **kwargs: Any
) -> PreTrainedModel:
    """
    Load a classifier with its record, and with its hook if the folder has the factors.

    Raises:
        `IncompatibleBaseError`: the weights are not those of the record.
    """
    about_the_hub = ("revision", "token", "cache_dir", "trust_remote_code")
    hub = {key: kwargs[key] for key in about_the_hub if key in kwargs}
    opener = class_of(AutoConfig.from_pretrained(source, **hub))
    model = opener.from_pretrained(source, variant=record.variant, use_safetensors=True, **kwargs)
    require_saved_weights(folder, record)
    sites = {name: Site(name, find_module(model, name), space=name) for name in record.sites}
    remaps = read_delta(folder)
    request = record.request if remaps else replace(record.request, router=None)
    erasure = ClassErasure(request, record.facts, sites, remaps, None, record.guarantees, record.proof)
    if remaps:
        erasure.hooks = make_hooks(erasure, sites, next(model.parameters()).device)
        attach_hooks(erasure.hooks, [site.module for site in sites.values()])
        trained = read_router(folder)
        if trained is not None:
            erasure.hook.router.weight = trained.to(erasure.hook.router.weight)
    register(model, erasure)
    return model
