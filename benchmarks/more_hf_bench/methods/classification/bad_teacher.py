"""Learn what is forgotten from a teacher that knows nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from ...splits import Splits
from .training import frozen_copy, predict, reinitialised, train


def bad_teacher(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 1e-4,
    share: float = 0.3,
    epochs: int = 1,
    batch_size: int = 256,
) -> nn.Module:
    """Distil D_f from a randomly initialised teacher and a part of D_r from the original (Chundawat et al.,
    2023).

    Args:
        share (`float`, defaults to 0.3): of D_r, drawn at random, that is shown.
        lr (`float`), epochs (`int`), batch_size (`int`): the source's, with Adam. Its KL is the mean over all
            entries, `num_classes` times smaller than the mean over samples; the rate belongs to that.
    """
    good, bad = frozen_copy(model), frozen_copy(reinitialised(model, seed))
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randperm(len(splits.r), generator=generator)[: round(share * len(splits.r))]
    device = next(model.parameters()).device

    def steps(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Rows below n are of D_f, the others are of the part of D_r that is shown.
        n = len(splits.f)
        for rows in torch.randperm(n + len(shown), generator=generator).split(batch_size):
            forget = splits.f[rows[rows < n]]["pixel_values"]
            remain = splits.r[shown[rows[rows >= n] - n]]["pixel_values"]
            is_forget = torch.arange(len(rows)) < len(forget)
            yield torch.cat([forget, remain]).to(device), is_forget.to(device)

    def loss(images: Tensor, is_forget: Tensor) -> Tensor:
        with torch.no_grad():
            wrong, right = (predict(teacher, images).softmax(-1) for teacher in (bad, good))
            taught = torch.where(is_forget[:, None], wrong, right)
        return kl_div(predict(model, images).log_softmax(-1), taught, reduction="none").mean()

    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return train(model, steps, loss, optimizer, epochs=epochs, seed=seed, desc="bad-teacher")
