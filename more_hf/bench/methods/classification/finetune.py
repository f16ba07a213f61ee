"""Train on, on what remains."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import cross_entropy

from .training import predict, read, sgd, train


def finetune(model: nn.Module, splits, *, seed: int = 0, lr: float = 0.01, epochs: int = 10, batch_size: int = 256) -> nn.Module:
    """Minimise the cross-entropy of D_r, and trust that D_f is forgotten on the way (Warnecke et al., 2021).

    Args:
        lr (`float`), epochs (`int`), batch_size (`int`): SalUn's and l1-sparse's; users needed up to 0.04.
    """
    remain = splits.r.loader(batch_size, seed=seed)

    def loss(images, labels):
        return cross_entropy(predict(model, images), labels)

    return train(model, lambda epoch: read(remain, model), loss, sgd(model.parameters(), lr), epochs=epochs, seed=seed, desc="finetune")
