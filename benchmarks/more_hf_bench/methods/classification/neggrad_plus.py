"""Descent on what remains and ascent on what is forgotten, in the same step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import Splits
from .training import Batch, batches, predict, sgd, train


def neggrad_plus(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 0.01,
    alpha: float = 0.95,
    epochs: int = 10,
    batch_size: int = 256,
) -> nn.Module:
    """Minimise α CE(D_r) − (1 − α) CE(D_f), one batch of each in a step, D_f again from the start when it
    ends (Kurmanji et al., 2023).

    Args:
        alpha (`float`), lr (`float`), epochs (`int`): SCRUB's comparison, which uses no weight decay.
    """
    remain = splits.r.loader(batch_size, seed=seed)
    forget = splits.f.loader(batch_size, seed=seed + 1)

    def steps(epoch: int) -> Iterator[tuple[Batch, Batch]]:
        endless = chain.from_iterable(batches(forget, model) for _ in repeat(None))
        return zip(batches(remain, model), endless, strict=False)

    def loss(remain: Batch, forget: Batch) -> Tensor:
        descent, ascent = (cross_entropy(predict(model, x), y) for x, y in (remain, forget))
        return alpha * descent - (1 - alpha) * ascent

    optimizer = sgd(model.parameters(), lr, weight_decay=0)
    return train(model, steps, loss, optimizer, epochs=epochs, seed=seed, desc="neggrad-plus")
