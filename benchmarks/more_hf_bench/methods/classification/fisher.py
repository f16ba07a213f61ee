"""Noise in the weights, where what remains does not need them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import ImageSet, Splits
from .head_features import find_head
from .training import batches, check_finite, predict


def fisher(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    alpha: float = 1e-7,
    limit: float = 1e3,
    samples: int = 1000,
) -> nn.Module:
    """Add N(0, α min(1/F, limit)) to each weight, F the diagonal Fisher information of D_r (Golatkar et al.,
    2020).

    As in SCRUB's port: `limit` is ten times lower and α ten times higher in the head, α ten times higher for
    norms and biases, and the head's rows of classes that only D_f has become N(0, 1e-4). Not as there: F is
    over single samples, not batches of 32, and its expectation over labels is one draw from the model's own
    distribution per sample.

    Args:
        alpha (`float`, defaults to 1e-7): SCRUB uses 1e-6 to 1e-7.
        samples (`int`, defaults to 1000): of D_r, drawn at random, that F is estimated on, one backward pass
            each.
    """
    generator = torch.Generator().manual_seed(seed)
    information = fisher_information(model, splits.r, samples, generator)
    head_name, head = find_head(model, splits.f)
    classes = splits.f.labels.unique().tolist()
    only_forgotten = [c for c in classes if not (splits.r.labels == c).any()]

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            of_head = name.startswith(f"{head_name}.")
            highest = limit / 10 if of_head else limit
            variance = alpha * (1 / (information[name] + 1e-8)).clamp_max(highest)
            scale = 10.0 if of_head or parameter.ndim == 1 else 1.0
            parameter.add_(normal(parameter) * (scale * variance).sqrt())
        for parameter in head.parameters():
            for row in only_forgotten:
                parameter[row] = 1e-2 * normal(parameter[row])
    check_finite(model, "fisher")
    return model


def fisher_information(
    model: nn.Module, images: ImageSet, samples: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """For each parameter, the mean over samples of (∂ log p(y|x))², y drawn from the model itself; in
    evaluation mode."""
    model.eval()
    rows = torch.randperm(len(images), generator=generator)[:samples]
    information = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    with torch.enable_grad():
        for pixels, _ in batches((images[row] for row in rows.split(1)), model):
            logits = predict(model, pixels)
            probabilities = logits.detach().softmax(-1).cpu()
            label = torch.multinomial(probabilities, 1, generator=generator)[0].to(logits.device)
            model.zero_grad(set_to_none=True)
            cross_entropy(logits, label).backward()
            for name, parameter in model.named_parameters():
                information[name] += parameter.grad.square() / len(rows)
    model.zero_grad(set_to_none=True)
    return information
