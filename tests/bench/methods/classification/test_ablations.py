"""Ours without prototype orthogonalisation, and without the complement term."""

import copy

import pytest
import torch
from support.squares import head_inputs, pixels, remaining

from more_hf.core.errors import MoreError
from more_hf_bench.methods.registry import CLASSIFICATION


def prototypes(model, splits):
    """Means of the forgotten class and of classes 0, 1 and 3, as rows."""
    parts = [splits.f, *(remaining(splits, c) for c in (0, 1, 3))]
    return torch.stack([head_inputs(model, part).mean(0) for part in parts])


def test_without_po_moves_means_where_it_says(model, splits):
    P = prototypes(model, splits)
    erased = CLASSIFICATION["erase-without-po"].load()(copy.deepcopy(model), splits)
    mean = head_inputs(erased, splits.f).mean(0)
    assert mean.norm() < 1e-5 * P[0].norm()
    remapped = CLASSIFICATION["remap-without-po"].load()(copy.deepcopy(model), splits, target=1)
    assert torch.allclose(head_inputs(remapped, splits.f).mean(0), P[2], atol=1e-4)
    moved = head_inputs(remapped, remaining(splits, 3)).mean(0) - P[3]
    expected = (P[2] - P[0]) * (P[0] @ P[3]) / (P[0] @ P[0])  # what orthogonalisation would prevent
    assert torch.allclose(moved, expected, atol=1e-4)
    assert expected.norm() > 0.05 * P[3].norm()
    with pytest.raises(MoreError, match="Class 9 is not among the remaining classes"):
        CLASSIFICATION["remap-without-po"].load()(model, splits, target=9)


def test_without_complement_nothing_is_left_beside_the_prototypes(model, splits):
    P = prototypes(model, splits).T
    whole = model[:-1](pixels(splits.r)).double()
    for name, settings, forget_to in (("erase", {}, 0 * P[:, 0]), ("remap", {"target": 1}, P[:, 2])):
        edited = CLASSIFICATION[f"{name}-without-complement"].load()(copy.deepcopy(model), splits, **settings)
        assert torch.allclose(head_inputs(edited, splits.f).mean(0), forget_to, atol=1e-4)
        for i, c in enumerate((0, 1, 3), 1):
            mean = head_inputs(edited, remaining(splits, c)).mean(0)
            assert torch.allclose(mean, P[:, i], atol=1e-4)  # PO spares the others
        # coordinates of remaining samples, by least squares instead of a pseudo-inverse
        coordinates = torch.linalg.lstsq(P, whole.T).solution
        coordinates[0], forgotten = 0, coordinates[0].clone()
        expected = P @ coordinates + forget_to[:, None] * forgotten
        assert torch.allclose(head_inputs(edited, splits.r), expected.T, atol=1e-4)
        assert torch.linalg.matrix_rank(head_inputs(edited, splits.r), rtol=1e-4) == 3
    assert torch.linalg.matrix_rank(whole, rtol=1e-4) > 3
    with pytest.raises(MoreError, match="Class 2 is not among the remaining classes"):
        CLASSIFICATION["remap-without-complement"].load()(model, splits, target=2)
