"""Away from a teacher on what is forgotten, towards it on what remains."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ...splits import Splits
from .training import batches, frozen_copy, predict, sgd, train


def scrub(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 5e-4,
    alpha: float = 0.001,
    gamma: float = 0.99,
    temperature: float = 4.0,
    max_epochs: int = 2,
    epochs: int = 3,
    batch_size: int = 128,
    forget_batch_size: int = 32,
) -> nn.Module:
    """Maximise KL_T(teacher, model) on D_f in the first epochs, and minimise γ CE + α KL_T on D_r in all
    (Kurmanji et al., 2023).

    Args:
        alpha (`float`), gamma (`float`), temperature (`float`): α, γ, T; KL_T = T² KL of distributions
            softened by T, mean over a batch.
        max_epochs (`int`, defaults to 2): epochs that begin with a pass over D_f.
        lr (`float`), epochs (`int`), batch_size (`int`), forget_batch_size (`int`): the source's large-scale
            setting.
    """
    teacher = frozen_copy(model)
    remain = splits.r.loader(batch_size, seed=seed)
    forget = splits.f.loader(forget_batch_size, seed=seed + 1)

    def steps(epoch: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        if epoch < max_epochs:
            for images, labels in batches(forget, model):
                yield images, labels, True
        for images, labels in batches(remain, model):
            yield images, labels, False

    def loss(images: Tensor, labels: Tensor, is_forget: bool) -> Tensor:
        logits = predict(model, images)
        with torch.no_grad():
            taught = predict(teacher, images)
        distance = softened_kl(taught, logits, temperature)
        if is_forget:
            return -distance
        return gamma * cross_entropy(logits, labels) + alpha * distance

    optimizer = sgd(model.parameters(), lr)
    return train(model, steps, loss, optimizer, epochs=epochs, seed=seed, desc="scrub")


def softened_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over a batch of logits `(batch, k)`."""
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * kl_div(log_q, log_p, reduction="batchmean", log_target=True)
