"""Random labels, for the weights that matter most to what is forgotten."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import Splits
from .random_labels import relabelled
from .training import batches, predict, sgd, train


def salun(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    lr: float = 0.013,
    share: float = 0.5,
    epochs: int = 10,
    batch_size: int = 256,
) -> nn.Module:
    """Random labels that change only the salient weights: saliency unlearning (Fan et al., 2024).

    The other weights end bit for bit as they were: gradients and momentum are masked, and weight decay is
    undone after each step.

    Args:
        share (`float`, defaults to 0.5): of all weights of the model, ranked together, that may change.
        lr (`float`), epochs (`int`), batch_size (`int`): the source's example.
    """
    masks = salient(model, splits, share, batch_size)
    steps, loss = relabelled(model, splits, batch_size, seed)
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = sgd(model.parameters(), lr)

    def mask_gradients() -> None:
        for name, parameter in parameters.items():
            parameter.grad.mul_(masks[name])

    @torch.no_grad()
    def put_back() -> None:
        for name, parameter in parameters.items():
            parameter.copy_(torch.where(masks[name], parameter, before[name]))
            optimizer.state[parameter]["momentum_buffer"].mul_(masks[name])

    return train(
        model,
        steps,
        loss,
        optimizer,
        epochs=epochs,
        seed=seed,
        desc="salun",
        before_step=mask_gradients,
        after_step=put_back,
    )


def salient(model: nn.Module, splits: Splits, share: float, batch_size: int) -> dict[str, Tensor]:
    """A boolean mask for each parameter: the `share` of all entries with the largest |Σ ∇CE(D_f)|, in
    evaluation mode."""
    model.eval().zero_grad(set_to_none=True)
    with torch.enable_grad():
        for images, labels in batches(splits.f.loader(batch_size), model):
            cross_entropy(predict(model, images), labels).backward()  # adds up over the batches
    sizes = {name: parameter.grad.abs() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    # All entries are ranked together, as one vector, which is then cut into the parameters again.
    flat = torch.cat([size.flatten() for size in sizes.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(round(share * len(flat))).indices] = True
    parts = chosen.split([size.numel() for size in sizes.values()])
    return {name: part.view_as(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}
