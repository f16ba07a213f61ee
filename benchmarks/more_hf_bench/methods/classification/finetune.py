"""Train on, on what remains."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import Splits
from .training import Batch, batches, predict, sgd, train


def finetune(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 0.01,
    epochs: int = 10,
    batch_size: int = 256,
) -> nn.Module:
    """Minimise the cross-entropy of D_r, and trust that D_f is forgotten on the way (Warnecke et al., 2021).

    Args:
        lr (`float`), epochs (`int`), batch_size (`int`): SalUn's and l1-sparse's; users needed up to 0.04.
    """
    remain = splits.r.loader(batch_size, seed=seed)

    def steps(epoch: int) -> Iterator[Batch]:
        return batches(remain, model)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(predict(model, images), labels)

    optimizer = sgd(model.parameters(), lr)
    return train(model, steps, loss, optimizer, epochs=epochs, seed=seed, desc="finetune")
