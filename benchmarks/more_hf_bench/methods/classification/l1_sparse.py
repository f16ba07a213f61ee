"""Train on, on what remains, with an l1 penalty that fades out."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import Splits
from .training import batches, predict, sgd, train


def l1_sparse(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 0.01,
    alpha: float = 5e-4,
    epochs: int = 10,
    batch_size: int = 256,
) -> nn.Module:
    """Minimise CE(D_r) + α (1 − e/E) ‖θ‖₁ in epoch e of E: l1-sparse unlearning (Jia et al., 2023).

    Args:
        alpha (`float`, defaults to 5e-4): of the first epoch; norms and biases are penalised too, as in the
            source.
        lr (`float`), epochs (`int`), batch_size (`int`): the source's.
    """
    remain = splits.r.loader(batch_size, seed=seed)

    def steps(epoch: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        weight = alpha * (1 - epoch / epochs)
        return ((images, labels, weight) for images, labels in batches(remain, model))

    def loss(images: Tensor, labels: Tensor, weight: float) -> Tensor:
        norm = sum(parameter.abs().sum() for parameter in model.parameters())
        return cross_entropy(predict(model, images), labels) + weight * norm

    optimizer = sgd(model.parameters(), lr)
    return train(model, steps, loss, optimizer, epochs=epochs, seed=seed, desc="l1-sparse")
