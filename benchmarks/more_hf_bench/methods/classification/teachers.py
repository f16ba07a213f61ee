"""Methods in which what is forgotten learns the answers of another model, or of an attacked input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ...splits import Splits
from .head_features import features, find_head
from .training import (
    Batch,
    Training,
    batches,
    check_finite,
    entropy,
    frozen_copy,
    predict,
    reinitialised,
    sgd,
    taking,
)


@taking(Training, lr=1e-5, epochs=10, batch_size=64)
def boundary_shrink(model: nn.Module, splits: Splits, training: Training, *, bound: float = 0.2) -> nn.Module:
    """Train D_f towards what the original model takes its adversarial neighbour for; D_r is not read (Chen
    et al., 2023).

    Args:
        bound (`float`, defaults to 0.2): of the one-step L∞ attack, in units of `pixel_values`: the source's
            0.1 of images in [0, 1], for pixels in [−1, 1].
        lr (`float`), epochs (`int`), batch_size (`int`): the source's, whose rate moves little here: choose
            it on validation data.
    """
    teacher = frozen_copy(model)
    forget = training.loader(splits.f)

    def steps(epoch: int) -> Iterator[Batch]:
        for images, labels in batches(forget, model):
            yield images, nearest_class(teacher, images, labels, bound)

    optimizer = sgd(model.parameters(), training.lr, weight_decay=0)
    return training.run(model, steps, partial(entropy, model), optimizer)


def nearest_class(teacher: nn.Module, images: Tensor, labels: Tensor, bound: float) -> Tensor:
    """The teacher's class `(batch,)` after one step of `bound` along the sign of the loss's gradient, kept
    in the images' range."""
    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(entropy(teacher, leaf, labels), leaf)
    attacked = (images + bound * gradient.sign()).clamp(images.min(), images.max())
    with torch.no_grad():
        return predict(teacher, attacked).argmax(-1)


@taking(Training, lr=5e-4, epochs=3, batch_size=128)
def scrub(
    model: nn.Module,
    splits: Splits,
    training: Training,
    *,
    alpha: float = 0.001,
    gamma: float = 0.99,
    temperature: float = 4.0,
    max_epochs: int = 2,
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
    remain = training.loader(splits.r)
    forget = splits.f.loader(forget_batch_size, seed=training.seed + 1)

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

    return training.run(model, steps, loss)


def softened_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over a batch of logits `(batch, k)`."""
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@taking(Training, lr=1e-4, epochs=1, batch_size=256)
def bad_teacher(model: nn.Module, splits: Splits, training: Training, *, share: float = 0.3) -> nn.Module:
    """Distil D_f from a randomly initialised teacher and a part of D_r from the original (Chundawat et al.,
    2023).

    Args:
        share (`float`, defaults to 0.3): of D_r, drawn at random, that is shown.
        lr (`float`), epochs (`int`), batch_size (`int`): the source's, with Adam. Its KL is the mean over all
            entries, `num_classes` times smaller than the mean over samples; the rate belongs to that.
    """
    good, bad = frozen_copy(model), frozen_copy(reinitialised(model, training.seed))
    generator = torch.Generator().manual_seed(training.seed)
    shown = torch.randperm(len(splits.r), generator=generator)[: round(share * len(splits.r))]
    device = next(model.parameters()).device

    def steps(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Rows below n are of D_f, the others are of the part of D_r that is shown.
        n = len(splits.f)
        for rows in torch.randperm(n + len(shown), generator=generator).split(training.batch_size):
            forget = splits.f[rows[rows < n]]["pixel_values"]
            remain = splits.r[shown[rows[rows >= n] - n]]["pixel_values"]
            is_forget = torch.arange(len(rows)) < len(forget)
            yield torch.cat([forget, remain]).to(device), is_forget.to(device)

    def loss(images: Tensor, is_forget: Tensor) -> Tensor:
        with torch.no_grad():
            wrong, right = (predict(teacher, images).softmax(-1) for teacher in (bad, good))
            taught = torch.where(is_forget[:, None], wrong, right)
        return kl_div(predict(model, images).log_softmax(-1), taught, reduction="none").mean()

    return training.run(model, steps, loss, torch.optim.Adam(model.parameters(), lr=training.lr))


@taking(Training, lr=1e-3, epochs=3, batch_size=64)
def lau(
    model: nn.Module,
    splits: Splits,
    training: Training,
    *,
    alpha: float = 0.5,
    temperature: float = 4.0,
    bound: float = 0.3,
    attack_step: float = 0.4,
    attack_steps: int = 40,
) -> nn.Module:
    """Layer attack unlearning: D_f's features are attacked against the head, and the head learns the
    attacked answers (Kim et al., 2024).

    Minimises (1 − α) CE + α KL_T over the head alone; D_r is not read. A teacher head is refreshed in each
    epoch. A sample that is still taken for its own class learns the teacher's answer to its attacked
    feature, any other keeps the teacher's answer to its own.

    Args:
        alpha (`float`), temperature (`float`), bound (`float`), attack_step (`float`), attack_steps (`int`),
            epochs (`int`): no official code exists; these are a third party's. `bound` is L∞, in units of
            features.
        lr (`float`, defaults to 1e-3): not known from any source.
    """
    _, head = find_head(model, splits.f)
    Z, labels = features(model, head, splits.f.loader(training.batch_size))
    Z = Z.to(head.weight.dtype)
    optimizer = sgd(head.parameters(), training.lr)
    generator = torch.Generator().manual_seed(training.seed)
    for _ in range(training.epochs):
        if not (head(Z).argmax(-1) == labels).any():
            break
        teacher = copy.deepcopy(head).requires_grad_(False)
        for rows in torch.randperm(len(Z), generator=generator).split(training.batch_size):
            z, y = Z[rows], labels[rows]
            # What the head learns: the attacked answer where it is still right, else the teacher's own.
            attacked = lau_attack(teacher, z, y, bound, attack_step, attack_steps)
            right = teacher(z).argmax(-1) == y
            taught = torch.where(right[:, None], teacher(attacked), teacher(z))
            with torch.enable_grad():
                logits = head(z)
                distance = softened_kl(taught, logits, temperature)
                loss = (1 - alpha) * cross_entropy(logits, taught.argmax(-1)) + alpha * distance
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
    check_finite(model, "lau")
    return model.eval()


def lau_attack(head: nn.Module, Z: Tensor, labels: Tensor, bound: float, step: float, steps: int) -> Tensor:
    """Projected gradient ascent on the head's loss: features `(n, d)`, each moved by at most `bound` in each
    coordinate."""
    attacked = Z.clone()
    for _ in range(steps):
        with torch.enable_grad():
            attacked.requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(head(attacked), labels), attacked)
        attacked = Z + (attacked.detach() + step * gradient.sign() - Z).clamp(-bound, bound)
    return attacked
