"""The lines that every other is compared with: nothing done, and a training that never saw D_f."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...splits import ImageSet, Splits


def original(model: nn.Module, splits: Splits, *, seed: int = 0) -> nn.Module:
    """Return the model as it is, in evaluation mode."""
    return model.eval()


def retrain(
    model: nn.Module, splits: Splits, *, seed: int = 0, fit: Callable[[ImageSet, int], nn.Module]
) -> nn.Module:
    """Return `fit(splits.r, seed)`; the weights of `model` play no part.

    Args:
        fit (`Callable`): the training that made `model`, from the same start with the same recipe, as a
            function of images and seed.
    """
    return fit(splits.r, seed).eval()
