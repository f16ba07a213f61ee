"""Train what is forgotten towards labels drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .training import Batch, predict, read, sgd, train


def random_labels(model: nn.Module, splits, *, seed: int = 0, lr: float = 0.01, epochs: int = 10, batch_size: int = 256) -> nn.Module:
    """In each epoch one pass over D_f with random labels, then one over D_r with its own (Golatkar et al., 2020; as in SalUn).

    Args:
        lr (`float`), epochs (`int`), batch_size (`int`): SalUn's, which tunes the rate between 0.01 and 0.1.
    """
    steps, loss = relabelled(model, splits, batch_size, seed)
    return train(model, steps, loss, sgd(model.parameters(), lr), epochs=epochs, seed=seed, desc="random-labels")


def relabelled(model: nn.Module, splits, batch_size: int, seed: int) -> tuple[Callable[[int], Iterator[Batch]], Callable[..., Tensor]]:
    """The steps and the loss of random labels. A label is uniform over all classes, the true one included, and drawn anew each time."""
    forget, remain = splits.f.loader(batch_size, seed=seed), splits.r.loader(batch_size, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)

    def steps(epoch: int) -> Iterator[Batch]:
        for images, _ in read(forget, model):
            yield images, None
        yield from read(remain, model)

    def loss(images: Tensor, labels: Tensor | None) -> Tensor:
        logits = predict(model, images)
        if labels is None:
            labels = torch.randint(logits.shape[1], (len(images),), generator=generator).to(logits.device)
        return cross_entropy(logits, labels)

    return steps, loss
