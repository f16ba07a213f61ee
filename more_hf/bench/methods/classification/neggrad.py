"""Gradient ascent on what is forgotten."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import cross_entropy

from .training import predict, read, sgd, train


def neggrad(model: nn.Module, splits, *, seed: int = 0, lr: float = 1e-4, epochs: int = 5, batch_size: int = 256) -> nn.Module:
    """Maximise the cross-entropy of D_f; D_r is not read (Thudi et al., 2022).

    Args:
        lr (`float`), epochs (`int`), batch_size (`int`): SalUn's; its maintainers advise up to 1e-3.
    """
    forget = splits.f.loader(batch_size, seed=seed)

    def loss(images, labels):
        return -cross_entropy(predict(model, images), labels)

    return train(model, lambda epoch: read(forget, model), loss, sgd(model.parameters(), lr), epochs=epochs, seed=seed, desc="neggrad")
