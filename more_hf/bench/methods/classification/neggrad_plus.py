"""Descent on what remains and ascent on what is forgotten, in the same step."""

from __future__ import annotations

from itertools import chain, repeat

from torch import nn
from torch.nn.functional import cross_entropy

from .training import predict, read, sgd, train


def neggrad_plus(
    model: nn.Module, splits, *, seed: int = 0, lr: float = 0.01, alpha: float = 0.95, epochs: int = 10, batch_size: int = 256
) -> nn.Module:
    """Minimise α CE(D_r) − (1 − α) CE(D_f), one batch of each in a step, D_f again from the start when it ends (Kurmanji et al., 2023).

    Args:
        alpha (`float`), lr (`float`), epochs (`int`): SCRUB's comparison, which uses no weight decay.
    """
    remain, forget = splits.r.loader(batch_size, seed=seed), splits.f.loader(batch_size, seed=seed + 1)

    def steps(epoch):
        return zip(read(remain, model), chain.from_iterable(read(forget, model) for _ in repeat(None)), strict=False)

    def loss(kept, lost):
        descent, ascent = (cross_entropy(predict(model, images), labels) for images, labels in (kept, lost))
        return alpha * descent - (1 - alpha) * ascent

    return train(model, steps, loss, sgd(model.parameters(), lr, weight_decay=0), epochs=epochs, seed=seed, desc="neggrad-plus")
