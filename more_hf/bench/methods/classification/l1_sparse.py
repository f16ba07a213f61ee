"""Train on, on what remains, with an l1 penalty that fades out."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import cross_entropy

from .training import predict, read, sgd, train


def l1_sparse(
    model: nn.Module, splits, *, seed: int = 0, lr: float = 0.01, alpha: float = 5e-4, epochs: int = 10, batch_size: int = 256
) -> nn.Module:
    """Minimise CE(D_r) + α (1 − e/E) ‖θ‖₁ in epoch e of E: l1-sparse unlearning (Jia et al., 2023).

    Args:
        alpha (`float`, defaults to 5e-4): of the first epoch; norms and biases are penalised too, as in the source.
        lr (`float`), epochs (`int`), batch_size (`int`): the source's.
    """
    remain = splits.r.loader(batch_size, seed=seed)

    def steps(epoch):
        return ((*batch, alpha * (1 - epoch / epochs)) for batch in read(remain, model))

    def loss(images, labels, weight):
        return cross_entropy(predict(model, images), labels) + weight * sum(p.abs().sum() for p in model.parameters())

    return train(model, steps, loss, sgd(model.parameters(), lr), epochs=epochs, seed=seed, desc="l1-sparse")
