"""The model that never saw what is forgotten: the field's gold standard, at the price of a training."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...splits import ImageSet, Splits


def retrain(
    model: nn.Module, splits: Splits, *, seed: int = 0, fit: Callable[[ImageSet, int], nn.Module]
) -> nn.Module:
    """Return `fit(splits.r, seed)`; the weights of `model` play no part.

    Args:
        fit (`Callable`): the training that made `model`, from the same start with the same recipe, as a
            function of images and seed.
    """
    return fit(splits.r, seed).eval()
