"""A linear map between feature extractor and head: how ESC, LEACE and ours without PO act; and the features that they read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ....classification.heads import find_heads
from ....core.errors import TargetNotFoundError
from .training import read


class FeatureMap:
    """z becomes z Mᵀ + b. A forward pre-hook of the head, so that the features that a probe reads are the mapped ones."""

    def __init__(self, matrix: Tensor, bias: Tensor | None = None):
        self.matrix, self.bias = matrix, torch.zeros_like(matrix[:, 0]) if bias is None else bias

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        z = args[0]
        return (z @ self.matrix.to(z).T + self.bias.to(z), *args[1:])


def find_head(model: nn.Module, images) -> tuple[str, nn.Linear]:
    """The one linear layer that gives the logits, with its name. Raises `TargetNotFoundError` for several."""
    pixels, _ = next(read(images.loader(2), model))
    heads = find_heads(model, pixels)
    if len(heads) > 1:
        raise TargetNotFoundError(f"{type(model).__name__} has {len(heads)} heads ({', '.join(heads)}); the baselines take one.")
    return next(iter(heads.items()))


def attach(model: nn.Module, head: nn.Linear, matrix: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Put a map in front of the head, `matrix` `(d, d)` and `bias` `(d,)`; return the model in evaluation mode."""
    head.register_forward_pre_hook(FeatureMap(matrix, bias))
    return model.eval()


def features(model: nn.Module, head: nn.Linear, loader: Iterable[dict[str, Tensor]], *, training: bool = False) -> tuple[Tensor, Tensor]:
    """What the head reads, `(n, d)` float64, and labels `(n,)`, on the model's device, in one pass; the model ends in evaluation mode.

    `training=True` collects in training mode, which overwrites the running statistics of BatchNorm.
    """
    seen: list[Tensor] = []
    labels = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    model.train(training)
    try:
        with torch.no_grad():
            for images, batch_labels in read(loader, model):
                model(images)
                labels.append(batch_labels)
    finally:
        handle.remove()
        model.eval()
    return torch.cat(seen), torch.cat(labels)
