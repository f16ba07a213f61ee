"""Retrain the head so that forgotten samples are taken for what an attack on their features makes of them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import Splits
from .head_features import features, find_head
from .scrub import softened_kl
from .training import check_finite, sgd


def lau(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    alpha: float = 0.5,
    temperature: float = 4.0,
    bound: float = 0.3,
    attack_step: float = 0.4,
    attack_steps: int = 40,
    epochs: int = 3,
    batch_size: int = 64,
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
    Z, labels = features(model, head, splits.f.loader(batch_size))
    Z = Z.to(head.weight.dtype)
    optimizer = sgd(head.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        if not (head(Z).argmax(-1) == labels).any():
            break
        teacher = copy.deepcopy(head).requires_grad_(False)
        for rows in torch.randperm(len(Z), generator=generator).split(batch_size):
            z, y = Z[rows], labels[rows]
            # What the head learns: the attacked answer where it is still right, else the teacher's own.
            attacked = attack(teacher, z, y, bound, attack_step, attack_steps)
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


def attack(head: nn.Module, Z: Tensor, labels: Tensor, bound: float, step: float, steps: int) -> Tensor:
    """Projected gradient ascent on the head's loss: features `(n, d)`, each moved by at most `bound` in each
    coordinate."""
    attacked = Z.clone()
    for _ in range(steps):
        with torch.enable_grad():
            attacked.requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(head(attacked), labels), attacked)
        attacked = Z + (attacked.detach() + step * gradient.sign() - Z).clamp(-bound, bound)
    return attacked
