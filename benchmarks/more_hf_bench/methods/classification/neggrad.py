"""Gradient ascent on what is forgotten."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import Splits
from .training import Batch, batches, predict, sgd, train


def neggrad(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 1e-4,
    epochs: int = 5,
    batch_size: int = 256,
) -> nn.Module:
    """Maximise the cross-entropy of D_f; D_r is not read (Thudi et al., 2022).

    Args:
        lr (`float`), epochs (`int`), batch_size (`int`): SalUn's; its maintainers advise up to 1e-3.
    """
    forget = splits.f.loader(batch_size, seed=seed)

    def steps(epoch: int) -> Iterator[Batch]:
        return batches(forget, model)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy(predict(model, images), labels)

    optimizer = sgd(model.parameters(), lr)
    return train(model, steps, loss, optimizer, epochs=epochs, seed=seed, desc="neggrad")
