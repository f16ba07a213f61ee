"""The features that a classifier's head reads, and a linear map in front of the head: how ESC, LEACE and our
ablations act."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from more_hf.classification.heads import find_heads
from more_hf.core.errors import MoreError, SiteNotFoundError
from more_hf.core.prototypes import PrototypeFitter

from ...splits import ImageSet, Splits
from .training import batches


class FeatureMap:
    """z becomes z Mᵀ + b. A forward pre-hook of the head, so that the features that a probe reads are the
    mapped ones."""

    def __init__(self, matrix: Tensor, bias: Tensor | None = None):
        self.matrix = matrix
        self.bias = torch.zeros_like(matrix[:, 0]) if bias is None else bias

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        z, *rest = args
        return (z @ self.matrix.to(z).T + self.bias.to(z), *rest)


def find_head(model: nn.Module, images: ImageSet) -> tuple[str, nn.Linear]:
    """The one linear layer that gives the logits, with its name. Raises `SiteNotFoundError` for several."""
    pixels, _ = next(batches(images.loader(2), model))
    heads = find_heads(model, pixels)
    if len(heads) > 1:
        raise SiteNotFoundError(
            f"{type(model).__name__} has {len(heads)} heads ({', '.join(heads)}), and this method takes one. "
            "Take a model with one head."
        )
    return next(iter(heads.items()))


def attach(model: nn.Module, head: nn.Linear, matrix: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Put a map in front of the head, `matrix` `(d, d)` and `bias` `(d,)`; return the model in evaluation
    mode."""
    head.register_forward_pre_hook(FeatureMap(matrix, bias))
    return model.eval()


def features(
    model: nn.Module, head: nn.Linear, loader: Iterable[dict[str, Tensor]], *, training: bool = False
) -> tuple[Tensor, Tensor]:
    """What the head reads, `(n, d)` float64, and labels `(n,)`, on the model's device, in one pass; the
    model ends in evaluation mode.

    `training=True` collects in training mode, which overwrites the running statistics of BatchNorm.
    """
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    model.train(training)
    try:
        with torch.no_grad():
            for images, batch_labels in batches(loader, model):
                model(images)
                labels.append(batch_labels)
    finally:
        handle.remove()
        model.eval()
    return torch.cat(inputs), torch.cat(labels)


def class_means(model: nn.Module, images: ImageSet, batch_size: int) -> Tensor:
    """Class means of the head's inputs as columns `(d, classes)`, float64, in the order of the labels."""
    _, head = find_head(model, images)
    z, labels = features(model, head, images.loader(batch_size))
    classes, positions = labels.unique(return_inverse=True)
    fitter = PrototypeFitter(z.shape[1], map(str, classes.tolist()), device=z.device)
    return fitter.update(z, positions).prototypes.matrix.to(z)


def remaining_class(splits: Splits, target: int | None) -> int:
    """The target, or the first remaining class. Raises `MoreError` for a target that does not remain."""
    remaining = splits.r.labels.unique().tolist()
    if target is None:
        return remaining[0]
    if target not in remaining:
        raise MoreError(f"Class {target} is not among the remaining classes {remaining}. Choose one of them.")
    return target
