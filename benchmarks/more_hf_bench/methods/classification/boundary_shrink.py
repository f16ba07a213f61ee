"""Move each forgotten sample over the decision boundary that is nearest to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import Splits
from .training import Batch, batches, frozen_copy, predict, sgd, train


def boundary_shrink(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 1e-5,
    bound: float = 0.2,
    epochs: int = 10,
    batch_size: int = 64,
) -> nn.Module:
    """Train D_f towards what the original model takes its adversarial neighbour for; D_r is not read (Chen
    et al., 2023).

    Args:
        bound (`float`, defaults to 0.2): of the one-step L∞ attack, in units of `pixel_values`: the source's
            0.1 of images in [0, 1], for pixels in [−1, 1].
        lr (`float`), epochs (`int`), batch_size (`int`): the source's, whose rate moves little here: choose
            it on validation data.
    """
    teacher = frozen_copy(model)
    forget = splits.f.loader(batch_size, seed=seed)

    def steps(epoch: int) -> Iterator[Batch]:
        for images, labels in batches(forget, model):
            yield images, nearest_class(teacher, images, labels, bound)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(predict(model, images), labels)

    optimizer = sgd(model.parameters(), lr, weight_decay=0)
    return train(model, steps, loss, optimizer, epochs=epochs, seed=seed, desc="boundary-shrink")


def nearest_class(teacher: nn.Module, images: Tensor, labels: Tensor, bound: float) -> Tensor:
    """The teacher's class `(batch,)` after one step of `bound` along the sign of the loss's gradient, kept
    in the images' range."""
    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(predict(teacher, leaf), labels), leaf)
    attacked = (images + bound * gradient.sign()).clamp(images.min(), images.max())
    with torch.no_grad():
        return predict(teacher, attacked).argmax(-1)
