"""OCE."""

import math

import pytest
import torch
from support.closed_forms import run
from support.texts import text_layers

from more_hf_bench.methods.diffusion.oce import erasing_term, rotation


@pytest.mark.parametrize(
    "M", [[[2.0, 1.0], [-0.5, 1.0]], [[-3.0, 0.2], [0.1, 1.0]]], ids=["positive", "negative determinant"]
)
def test_oce_rotation_is_the_best_of_all_angles(M):
    M = torch.tensor(M).double()
    Q = rotation(M)
    angles = 2 * math.pi * torch.arange(20000) / 20000
    # tr(Rᵀ M) for the rotation R by each angle
    traces = angles.cos() * (M[0, 0] + M[1, 1]) + angles.sin() * (M[1, 0] - M[0, 1])
    best = float(traces.max())
    assert float((Q * M).sum()) == pytest.approx(best, abs=1e-6)
    assert float(torch.linalg.det(Q)) == pytest.approx(1)


def test_oce_erasing_term_by_hand():
    eye = torch.eye(3).double()
    C, G = torch.tensor([[2.0, 0, 0]]).double(), torch.tensor([[1.0, 1, 0]]).double()
    # e1 e1ᵀ (I − h hᵀ), with h = (e1 + e2) / √2
    expected = -5 * torch.tensor([[0.5, -0.5, 0], [0, 0, 0], [0, 0, 0]]).double()
    assert torch.allclose(erasing_term(eye, C, G, 5.0), expected)
    assert torch.allclose(erasing_term(eye, C, 3 * C, 5.0), 0 * eye, atol=1e-12)


def test_oce_rotates_each_value_layer(tiny_sd):
    pipe = tiny_sd("2")
    before = text_layers(pipe)
    run("oce", pipe)
    for name, W in text_layers(pipe, ("to_v",)).items():
        Q = W @ torch.linalg.pinv(before[name])  # the tiny layers have full row rank
        assert torch.allclose(Q @ Q.T, torch.eye(len(Q)).double(), atol=1e-5)
        assert float(torch.linalg.det(Q)) == pytest.approx(1, abs=1e-5)
        assert (Q - torch.eye(len(Q)).double()).norm() > 0.1


def test_oce_that_erases_nothing_changes_nothing(tiny_sd):
    pipe = tiny_sd("2")
    before = text_layers(pipe)
    run("oce", pipe, erase_scale=0.0)
    assert all(torch.allclose(W, before[name], atol=1e-6) for name, W in text_layers(pipe).items())
