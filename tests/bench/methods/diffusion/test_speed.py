"""SPEED, against its formula in numpy and small cases by hand."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from support.closed_forms import CONCEPT, RETAIN, TARGET, run
from support.texts import last, text_layers, tokens

from more_hf_bench.methods.diffusion.speed import centroids, null_space, refined_prior, update


def test_update_on_two_axes():
    c, g, eye = torch.tensor([[1.0, 0]]).double(), torch.tensor([[0.0, 1]]).double(), torch.eye(2).double()
    change = update(c.T @ c, g.T @ c, eye, eye[:, :0], 1.0, 0.0)
    assert torch.allclose(change, torch.tensor([[-0.5, 0], [0.5, 0]]).double())


def test_update_is_the_constrained_least_squares_solution():
    torch.manual_seed(0)
    d = 8
    c, g, K = torch.randn(d).double(), torch.randn(d).double(), torch.randn(d, 2).double()
    R = torch.randn(3, d).double()
    P = null_space(R, 1e-9)
    change = update(torch.outer(c, c), torch.outer(g, c), P, K, 0.7, 0.0)
    # Rows of ΔW are in the range of P and orthogonal to P K: ridge regression on g − c in a basis of that.
    basis = torch.linalg.svd(torch.cat([R, (P @ K).T])).Vh[5:].T
    z = basis.T @ c
    ridge = torch.inverse(torch.outer(z, z) + 0.7 * torch.eye(3).double())
    assert torch.allclose(change, torch.outer(g - c, z) @ ridge @ basis.T, atol=1e-10)
    assert (change @ K).abs().max() < 1e-10
    assert (change @ R.T).abs().max() < 1e-10
    assert (change @ c).norm() > 0.1


def test_prior_keeps_what_the_edit_would_hurt():
    e = torch.eye(4).double()
    W = torch.diag(torch.tensor([1.0, 1, 1, 0.01]).double())
    A, B = torch.outer(e[0], e[0]), torch.outer(e[1], e[0])
    # Only the second has a part along c, the only direction that the edit moves.
    R = torch.stack([e[2], e[0] + e[2], e[3]])
    prior = refined_prior(W, A, B, R, 3, torch.Generator().manual_seed(0))
    assert torch.equal(prior[:1], R[1:2])
    assert len(prior) == 4
    # The copies differ along W's weakest direction.
    assert torch.allclose(prior[1:, :3], R[1:2, :3].expand(3, -1))
    assert (prior[1:, 3] - R[1, 3]).abs().min() > 0


def test_noise_is_along_the_weakest_direction_that_the_layer_sees():
    """W has fewer rows than columns: what it maps to zero is no direction to add noise along."""
    rng = np.random.default_rng(0)
    W, c, g, R = rng.normal(size=(3, 6)), rng.normal(size=6), rng.normal(size=6), rng.normal(size=(1, 6))
    A, B = np.outer(c, c), np.outer(g, c)
    arguments = (torch.from_numpy(x) for x in (W, A, B, R))
    prior = refined_prior(*arguments, 20, torch.Generator().manual_seed(0)).numpy()
    differences = prior[1:] - R
    values, vectors = np.linalg.eigh(W.T @ W)  # ascending: three zeros, then the squares of σ
    weakest = vectors[:, 3]
    assert len(differences) > 0
    assert np.allclose(differences, np.outer(differences @ weakest, weakest))
    lengths = np.linalg.norm(differences @ W.T, axis=1) / np.linalg.norm(differences, axis=1)
    assert np.allclose(lengths, np.sqrt(values[3]))
    assert lengths.min() > 0.1


@pytest.mark.parametrize("seed", [0, 9])
def test_centroids_are_the_best_of_all_partitions(seed):
    """Started at the first and then the farthest ones of these points, k-means ends in a worse optimum."""
    points = np.random.default_rng(seed).normal(size=(8, 2))
    costs = []
    for labels in itertools.product(range(3), repeat=8):
        groups = [points[np.array(labels) == i] for i in range(3)]
        if all(len(group) for group in groups):
            costs.append(sum(((group - group.mean(0)) ** 2).sum() for group in groups))
    centres = centroids(torch.from_numpy(points), 3, 0).numpy()
    cost = ((points[:, None] - centres) ** 2).sum(-1).min(1).sum()
    assert cost == pytest.approx(min(costs))


def test_centroids_of_few_points_are_the_points():
    points = torch.tensor([[0.0], [0.1], [5.0], [5.2], [9.0]]).double()
    assert sorted(centroids(points, 3, 0).flatten().tolist()) == pytest.approx([0.05, 5.1, 9.0])
    assert sorted(centroids(points[:2], 3, 0).flatten().tolist()) == pytest.approx([0.0, 0.1])


def speed_layer(W, c, g, R, K, threshold):
    """SPEED's closed form for one layer, with ρ = 1 and λ = 0, without augmentation; K has columns."""
    I, A, B = np.eye(len(c)), np.outer(c, c), np.outer(g, c)  # noqa: E741
    plain = W @ (B - A) @ np.linalg.inv(I + A)
    influence = np.linalg.norm(plain @ R.T, axis=0)
    R = R[influence >= influence.mean()]
    U, values, _ = np.linalg.svd(R.T @ R / len(R))
    P = U[:, values < threshold] @ U[:, values < threshold].T
    M = np.linalg.inv(A @ P + I)
    return W + W @ (B - A) @ P @ (I - M @ K @ np.linalg.inv(K.T @ P @ M @ K) @ K.T @ P) @ M


def test_is_the_formula_layer_by_layer(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe, ("to_v",))
    c, g = (last(pipe, name).numpy() for name in (CONCEPT, TARGET))
    R = np.stack([last(pipe, name).numpy() for name in (TARGET, *RETAIN)])
    empty = tokens(pipe, "")[0].numpy()
    centres = KMeans(3, n_init=10, random_state=0).fit(empty[1:]).cluster_centers_
    K = np.concatenate([empty[:1], centres]).T
    run("speed", pipe, augmentations=0, threshold=0.1)
    for name, W in text_layers(pipe, ("to_v",)).items():
        expected = speed_layer(before[name].numpy(), c, g, R, K, 0.1)
        assert np.allclose(W.numpy(), expected, atol=1e-5)
        assert not np.allclose(W.numpy(), before[name].numpy(), atol=1e-3)


def test_leaves_begin_token_and_retained_names_exactly(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    run("speed", pipe, threshold=1e-9, prior_filter=False)
    stays = [tokens(pipe, "")[0][0], *(last(pipe, name) for name in (TARGET, *RETAIN))]
    for name, W in text_layers(pipe, ("to_v",)).items():
        change = W - before[name]
        assert all((change @ z).norm() < 1e-5 * (before[name] @ z).norm() for z in stays)
        assert (change @ last(pipe, CONCEPT)).norm() > 1e-2 * (before[name] @ last(pipe, CONCEPT)).norm()
