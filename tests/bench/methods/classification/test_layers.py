"""Kodge et al. at every layer, against singular values of the activations themselves; and POUR-P."""

import copy

import torch
from support.squares import FORGET, K, head_inputs, pixels, unlearn
from torch import nn

from more_hf_bench.methods.classification.layers import kodge


def projection(rows, alpha):
    """Eq. of the paper: activations as columns, their singular values scaled by importance."""
    U, sigma, _ = torch.linalg.svd(rows.T, full_matrices=False)
    share = sigma**2 / (sigma**2).sum()
    return U @ torch.diag(alpha * share / ((alpha - 1) * share + 1)) @ U.T


def expected_weight(layer, remaining, forgotten, alpha_r, alpha_f):
    P_r, P_f = projection(remaining, alpha_r), projection(forgotten, alpha_f)
    d = len(P_r)
    weight = (
        layer.weight.detach().flatten(1).double() @ (torch.eye(d) - P_f @ (torch.eye(d).double() - P_r)).T
    )
    return weight.view_as(layer.weight).float()


def test_every_linear_layer_is_projected(model, splits):
    edited = unlearn("kodge", model, splits, alpha_r=20.0, alpha_f=5.0)
    of_r, of_f = (pixels(part).flatten(1).double() for part in (splits.r, splits.f))
    first = expected_weight(model[1], of_r, of_f, 20.0, 5.0)
    torch.testing.assert_close(edited[1].weight, first, rtol=1e-4, atol=1e-5)
    of_r, of_f = head_inputs(model, splits.r), head_inputs(model, splits.f)
    torch.testing.assert_close(edited[4].weight, expected_weight(model[4], of_r, of_f, 20.0, 5.0))
    assert not torch.allclose(edited[1].weight, model[1].weight, atol=1e-2)


def test_a_convolution_is_projected_by_its_patches(splits):
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(27, K)).eval()
    edited = kodge(copy.deepcopy(model), splits, samples=30)

    def patches(images):
        padded = nn.functional.pad(images, (1, 1, 1, 1)).double()
        return torch.stack(
            [
                image[0, i : i + 3, j : j + 3].flatten()
                for image in padded
                for i in (0, 2, 4)
                for j in (0, 2, 4)
            ]
        )

    kept = torch.cat([pixels(splits.r.subset(splits.r.labels == label))[:10] for label in (0, 1, 3)])
    expected = expected_weight(conv, patches(kept), patches(pixels(splits.f)[:30]), 100.0, 3.0)
    torch.testing.assert_close(edited[0].weight, expected, rtol=1e-4, atol=1e-5)


def test_pour_takes_the_classs_own_row_out_of_the_features(model, splits):
    edited = unlearn("pour", model, splits)
    row = model[4].weight[FORGET].detach().double()
    before, after = head_inputs(model, splits.r), head_inputs(edited, splits.r)
    assert (after @ row).abs().max() < 1e-4 < (before @ row).abs().max()
    torch.testing.assert_close(
        after, before - torch.outer(before @ row, row) / row.dot(row), rtol=1e-4, atol=1e-5
    )
