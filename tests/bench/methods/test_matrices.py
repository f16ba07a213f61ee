"""The matrices of the closed-form baselines, on small cases done by hand or another way."""

import math

import pytest
import torch

from more_hf.bench.methods.diffusion.cure import eraser
from more_hf.bench.methods.diffusion.oce import erasing_term, rotation
from more_hf.bench.methods.diffusion.rece import adversarial_embeddings
from more_hf.bench.methods.diffusion.speed import centroids, null_space, refined_prior, update
from more_hf.bench.methods.diffusion.uce import edit_matrix


def test_uce_matrix_on_two_axes():
    c, g = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    A = edit_matrix(c, g, c[:0], lamb=1.0, erase_scale=1.0, preserve_scale=1.0)
    assert torch.allclose(A, torch.tensor([[0.5, 0.0], [0.5, 1.0]]).double())


def test_rece_embedding_has_no_gradient_left():
    torch.manual_seed(0)
    W = torch.randn(3, 6, 5, dtype=torch.float64)  # three layers
    A, C = torch.randn(5, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    found = adversarial_embeddings(torch.einsum("lod,loe->de", W, W), A, C, rho=0.3).requires_grad_()
    loss = ((found @ (W @ A).transpose(1, 2) - C @ W.transpose(1, 2)) ** 2).sum() + 0.3 * (found**2).sum()
    assert torch.autograd.grad(loss, found)[0].abs().max() < 1e-9
    assert loss < ((C @ (W @ A).transpose(1, 2) - C @ W.transpose(1, 2)) ** 2).sum() + 0.3 * (C**2).sum()


def test_cure_projects_orthogonal_embeddings_out_and_spares_shared_ones():
    e = torch.eye(3).double()
    assert torch.allclose(eraser(e[:1], e[1:2], 2.0), torch.diag(torch.tensor([0.0, 1, 1]).double()))
    assert torch.allclose(eraser(e[:1], 5 * e[:1], 2.0), e)
    # two directions with half of the energy each: λ = 2 · ½ / (½ + 1)
    assert torch.allclose(eraser(e[:2], e[:0], 2.0), torch.diag(torch.tensor([1 / 3, 1 / 3, 1]).double()))
    # P_f P_r with a retained direction at 45 degrees
    both = eraser(e[:1], (e[:1] + e[1:2]), 2.0)
    assert torch.allclose(both, torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]).double())


def test_speed_update_on_two_axes():
    c, g, eye = torch.tensor([[1.0, 0]]).double(), torch.tensor([[0.0, 1]]).double(), torch.eye(2).double()
    change = update(c.T @ c, g.T @ c, eye, eye[:, :0], 1.0, 0.0)
    assert torch.allclose(change, torch.tensor([[-0.5, 0], [0.5, 0]]).double())


def test_speed_update_is_the_constrained_least_squares_solution():
    torch.manual_seed(0)
    d = 8
    c, g, K = torch.randn(d).double(), torch.randn(d).double(), torch.randn(d, 2).double()
    R = torch.randn(3, d).double()
    P = null_space(R, 1e-9)
    change = update(torch.outer(c, c), torch.outer(g, c), P, K, 0.7, 0.0)
    # rows of ΔW live in the range of P and orthogonal to P K: a basis of that, then plain ridge regression on g − c
    basis = torch.linalg.svd(torch.cat([R, (P @ K).T])).Vh[5:].T
    seen = basis.T @ c
    expected = torch.outer(g - c, seen) @ torch.inverse(torch.outer(seen, seen) + 0.7 * torch.eye(3).double()) @ basis.T
    assert torch.allclose(change, expected, atol=1e-10)
    assert (change @ K).abs().max() < 1e-10
    assert (change @ R.T).abs().max() < 1e-10
    assert (change @ c).norm() > 0.1


def test_speed_prior_keeps_what_the_edit_would_hurt():
    e = torch.eye(4).double()
    W = torch.diag(torch.tensor([1.0, 1, 1, 0.01]).double())
    A, B = torch.outer(e[0], e[0]), torch.outer(e[1], e[0])
    R = torch.stack([e[2], e[0] + e[2], e[3]])  # only the second has a part along c, the only direction that the edit moves
    prior = refined_prior(W, A, B, R, 3, torch.Generator().manual_seed(0))
    assert torch.equal(prior[:1], R[1:2])
    assert len(prior) == 4
    assert torch.allclose(prior[1:, :3], R[1:2, :3].expand(3, -1))  # the copies differ along W's weakest direction
    assert (prior[1:, 3] - R[1, 3]).abs().min() > 0


def test_speed_centroids():
    points = torch.tensor([[0.0], [0.1], [5.0], [5.2], [9.0]]).double()
    assert sorted(centroids(points, 3, 0).flatten().tolist()) == pytest.approx([0.05, 5.1, 9.0])
    assert len(centroids(points[:2], 3, 0)) == 2


def angle(theta):
    return torch.tensor([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]]).double()


@pytest.mark.slow
@pytest.mark.parametrize("M", [[[2.0, 1.0], [-0.5, 1.0]], [[-3.0, 0.2], [0.1, 1.0]]], ids=["positive", "negative determinant"])
def test_oce_rotation_is_the_best_of_all_angles(M):
    M = torch.tensor(M).double()
    Q = rotation(M)
    best = max(float((angle(2 * math.pi * i / 20000) * M).sum()) for i in range(20000))
    assert float((Q * M).sum()) == pytest.approx(best, abs=1e-6)
    assert float(torch.linalg.det(Q)) == pytest.approx(1)


def test_oce_erasing_term_by_hand():
    eye = torch.eye(3).double()
    C, G = torch.tensor([[2.0, 0, 0]]).double(), torch.tensor([[1.0, 1, 0]]).double()
    expected = -5 * torch.tensor([[0.5, -0.5, 0], [0, 0, 0], [0, 0, 0]]).double()  # e1 e1ᵀ (I − h hᵀ), h = (e1 + e2) / √2
    assert torch.allclose(erasing_term(eye, C, G, 5.0), expected)
    assert torch.allclose(erasing_term(eye, C, 3 * C, 5.0), 0 * eye, atol=1e-12)
