"""Every layer's weight times a projection of its input: Kodge et al."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from more_hf.classification.heads import evaluating
from more_hf.core.interrupts import unwound

from ...splits import Splits
from .training import batches


def kodge(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    alpha_r: float = 100.0,
    alpha_f: float = 3.0,
    samples: int = 900,
    batch_size: int = 64,
) -> nn.Module:
    """W becomes W (I − (I − P_r) P_f) at every linear layer and convolution: Kodge et al. (2024).

    P = U Λ Uᵀ of a layer's inputs, not centered, a convolution's as patches; of the share s = σ²/Σσ² of each
    direction, Λ is αs / ((α − 1)s + 1). All inputs are the original model's. The source samples patches; here
    all are counted. A grouped convolution is left as it is.

    Args:
        alpha_r (`float`), alpha_f (`float`), samples (`int`): the source's for CIFAR-10; as many images of
            what is forgotten, and as many of what remains, the same number of each class.
    """
    remaining = splits.r.labels.unique()
    few = samples // len(remaining)
    kept = torch.cat([torch.nonzero(splits.r.labels == label).flatten()[:few] for label in remaining])
    moments_r = input_moments(model, splits.r.subset(kept).loader(batch_size))
    moments_f = input_moments(
        model, splits.f.subset(torch.arange(len(splits.f))[:samples]).loader(batch_size)
    )
    for name, layer in layers(model):
        W = layer.weight.detach().flatten(1).double()
        W = projected(W, moments_r[name], moments_f[name], alpha_r, alpha_f)
        layer.weight.data = W.view_as(layer.weight).to(layer.weight)
    return model.eval()


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Every linear layer and every convolution that is not grouped, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            yield name, module


def input_moments(model: nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Σ x xᵀ `(d, d)` float64 over the inputs of each layer, d as wide as a row of its weight."""
    moments: dict[str, Tensor] = {}

    def add(name: str, layer: nn.Linear | nn.Conv2d, args: tuple[Tensor]) -> None:
        x = args[0].detach()
        if isinstance(layer, nn.Conv2d):
            x = unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).movedim(1, -1)
        x = x.flatten(0, -2).double()
        moments[name] = moments.get(name, 0) + x.T @ x

    with unwound() as hooks, evaluating(model):
        for name, layer in layers(model):
            hooks.callback(layer.register_forward_pre_hook(partial(add, name)).remove)
        for images, _ in batches(loader, model):
            model(images)
    return moments


def projected(W: Tensor, moment_r: Tensor, moment_f: Tensor, alpha_r: float, alpha_f: float) -> Tensor:
    """W (I − (I − P_r) P_f), by the second moments `(d, d)` of what remains and what is forgotten."""
    P_r, P_f = scaled_projection(moment_r, alpha_r), scaled_projection(moment_f, alpha_f)
    return W - (W - W @ P_r) @ P_f


def scaled_projection(moment: Tensor, alpha: float) -> Tensor:
    """U Λ Uᵀ `(d, d)` of a second moment: 1 where a direction has all of it, 0 where it has nothing."""
    powers, U = torch.linalg.eigh(moment)
    share = powers.clamp_min(0) / powers.clamp_min(0).sum()
    return (U * (alpha * share / ((alpha - 1) * share + 1))) @ U.T
