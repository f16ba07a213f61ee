"""The model that never saw what is forgotten: the field's gold standard, at the price of a training."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def retrain(model: nn.Module, splits, *, seed: int = 0, fit: Callable[..., nn.Module]) -> nn.Module:
    """Return `fit(splits.r, seed)`; the weights of `model` play no part.

    Args:
        fit (`Callable`): what trained `model`, from the same start with the same recipe, as a function of images and seed.
    """
    return fit(splits.r, seed).eval()
