"""Train what is forgotten towards labels drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import Splits
from .training import batches, predict, sgd, train


def random_labels(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 0.01,
    epochs: int = 10,
    batch_size: int = 256,
) -> nn.Module:
    """In each epoch one pass over D_f with random labels, then one over D_r with its own (Golatkar et al.,
    2020; as in SalUn).

    Args:
        lr (`float`), epochs (`int`), batch_size (`int`): SalUn's, which tunes the rate between 0.01 and 0.1.
    """
    steps, loss = relabelled(model, splits, batch_size, seed)
    optimizer = sgd(model.parameters(), lr)
    return train(model, steps, loss, optimizer, epochs=epochs, seed=seed, desc="random-labels")


Step = tuple[Tensor, Tensor | None]  # images, and their labels unless they are to be drawn


def relabelled(
    model: nn.Module, splits: Splits, batch_size: int, seed: int
) -> tuple[Callable[[int], Iterator[Step]], Callable[..., Tensor]]:
    """The steps and the loss of random labels. A label is uniform over all classes, the true one included,
    and drawn anew each time."""
    forget = splits.f.loader(batch_size, seed=seed)
    remain = splits.r.loader(batch_size, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)

    def steps(epoch: int) -> Iterator[Step]:
        for images, _ in batches(forget, model):
            yield images, None
        yield from batches(remain, model)

    def loss(images: Tensor, labels: Tensor | None) -> Tensor:
        logits = predict(model, images)
        if labels is None:
            labels = torch.randint(logits.shape[1], (len(images),), generator=generator).to(logits.device)
        return cross_entropy(logits, labels)

    return steps, loss
