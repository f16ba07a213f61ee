"""The closed forms: what holds for every one of them, and each against its formula or cases by hand."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from support.compare import changed, same, state
from support.methods import CONCEPT, MANY, RETAIN, TARGET, run
from support.texts import last, text_layers, tokens

from more_hf.core.errors import MoreError, PrototypeError
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf.diffusion.erase import erase_concept
from more_hf_bench.methods.diffusion.closed_form import (
    adversarial_embeddings,
    centroids,
    cure_eraser,
    erasing_term,
    null_space,
    refined_prior,
    rotation,
    speed_update,
)
from more_hf_bench.methods.registry import DIFFUSION


CLOSED = ["uce", "rece", "cure", "speed", "oce", "more-without-po"]
VALUES_ONLY = {"speed", "oce"}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("name", CLOSED)
def test_moves_the_picture_and_only_layers_that_read_text(tiny_sd, name, version):
    pipe = tiny_sd(version)
    ask = {"num_inference_steps": 2, "output_type": "latent", "prompt": [f"a cat by {CONCEPT}"]}
    picture = pipe(**ask, generator=torch.Generator().manual_seed(0)).images
    before, torch_state, numpy_state = state(pipe), torch.get_rng_state(), np.random.get_state()[1].copy()
    assert run(name, pipe) is pipe
    ends = ("to_v",) if name in VALUES_ONLY else ("to_k", "to_v")
    assert changed(pipe, before) == {f"unet.{key}" for key in text_layers(pipe, ends)}
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    after = pipe(**ask, generator=torch.Generator().manual_seed(0)).images
    assert torch.isfinite(after).all()
    assert (after - picture).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", CLOSED)
def test_works_in_half_precision_and_without_targets_or_retained_names(tiny_sd, name):
    pipe = tiny_sd("1")
    pipe.unet.to(torch.bfloat16)
    before = state(pipe)
    run(name, pipe, remap_to=None, retain=None)  # "art" stands in where a method needs a guide
    assert not same(pipe, before)
    assert {w.dtype for name, w in pipe.unet.named_parameters() if "attn2" in name} == {torch.bfloat16}


@pytest.mark.parametrize("name", CLOSED)
def test_names_are_checked_and_nothing_is_changed_then(tiny_sd, name):
    pipe = tiny_sd("1")
    before = state(pipe)
    with pytest.raises(PrototypeError, match="both erased"):
        run(name, pipe, retain=["Van Gogh"])
    assert same(pipe, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLOSED if name != "uce"])
def test_several_concepts_with_aliases(tiny_sd, name):
    pipe = tiny_sd("1", block_out_channels=(16, 32))
    before = text_layers(pipe, ("to_v",))
    DIFFUSION[name].load()(pipe, MANY, remap_to=[TARGET, "johannes vermeer"], retain=RETAIN)
    assert all((W - before[key]).norm() > 1e-4 for key, W in text_layers(pipe, ("to_v",)).items())


def uce_layer(W, old, new, kept, lamb, erase, preserve):
    """The formula as a loop over embeddings, for one layer."""
    left, right = lamb * W, lamb * torch.eye(W.shape[1], dtype=W.dtype)
    for c, g in zip(old, new, strict=True):
        left, right = left + erase * torch.outer(W @ g, c), right + erase * torch.outer(c, c)
    for r in kept:
        left, right = left + preserve * torch.outer(W @ r, r), right + preserve * torch.outer(r, r)
    return left @ torch.inverse(right)


def paper_sequences(pipe, concept, target):
    (old, n_old), (new, n_new) = tokens(pipe, concept), tokens(pipe, target)
    a, b = n_old - 2, n_new - 2
    shift = max(a, b)
    return old[a : len(old) - (shift - a)], new[b : len(new) - (shift - b)]


@pytest.mark.parametrize("version", ["1", "2"])
def test_uce_is_the_formula_layer_by_layer(tiny_sd, version):
    pipe = tiny_sd(version)
    before = text_layers(pipe)
    kept = [last(pipe, name) for name in (TARGET, *RETAIN)]
    run("uce", pipe)
    for name, W in text_layers(pipe).items():
        expected = uce_layer(before[name], [last(pipe, CONCEPT)], [last(pipe, TARGET)], kept, 0.5, 1.0, 1.0)
        assert torch.allclose(W, expected, atol=1e-6)
        assert not torch.allclose(W, before[name], atol=1e-3)


def test_uce_takes_art_as_guide_without_a_target_and_expands_prompts(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    run("uce", pipe, remap_to=None, retain=None, expand="art")
    forms = ["{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"]
    old, new = ([last(pipe, form.format(name)) for form in forms] for name in (CONCEPT, "art"))
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(before[name], old, new, [], 0.5, 1.0, 1.0), atol=1e-6)


def test_uce_of_several_concepts_sends_each_to_the_mean_of_the_targets(tiny_sd):
    pipe, targets = tiny_sd("1"), [TARGET, "johannes vermeer"]
    before = text_layers(pipe)
    DIFFUSION["uce"].load()(pipe, MANY, remap_to=targets, retain=RETAIN)
    old = [last(pipe, name) for name in (CONCEPT, "vincent", "kelly mckernan")]
    new = sum(last(pipe, name) for name in targets) / 2
    kept = [last(pipe, name) for name in (*targets, *RETAIN)]
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(before[name], old, [new] * 3, kept, 0.5, 1.0, 1.0), atol=1e-6)


def test_uce_of_the_paper_edits_sequences(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    old, new = paper_sequences(pipe, CONCEPT, TARGET)
    assert len(old) == len(new) < len(tokens(pipe, CONCEPT)[0]) - 1
    kept = torch.cat([tokens(pipe, name)[0] for name in ("", TARGET, *RETAIN)])
    run("uce", pipe, variant="paper")
    for name, W in text_layers(pipe).items():
        expected = uce_layer(before[name], old, new, kept, 0.5, 1.0, 0.25)  # one over four prompts
        assert torch.allclose(W, expected, atol=1e-6)
    with pytest.raises(MoreError, match="variant"):
        run("uce", pipe, variant="2025")


def test_uce_for_small_lambda_is_remap_with_one_expert(tiny_sd):
    pipe = tiny_sd("2")
    before = text_layers(pipe)
    names = (CONCEPT, TARGET, *RETAIN)
    P = Prototypes(torch.stack([last(pipe, name) for name in names], dim=1), names, torch.ones(len(names)))
    remap = Remap.fit(P, forget=[CONCEPT], targets=[[TARGET]])
    distances = []
    for lamb in (1e-9, 1.0):
        edited = tiny_sd("2")
        run("uce", edited, lamb=lamb)
        apart = []
        for name, W in text_layers(edited).items():
            merged = remap.merged(before[name])
            apart.append(float((W - merged).norm() / (merged - before[name]).norm()))
        distances.append(max(apart))
    assert distances[0] < 1e-4
    assert distances[1] > 1e-3


def test_rece_embedding_has_no_gradient_left():
    torch.manual_seed(0)
    W = torch.randn(3, 6, 5, dtype=torch.float64)  # three layers
    A, C = torch.randn(5, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    found = adversarial_embeddings(torch.einsum("lod,loe->de", W, W), A, C, rho=0.3).requires_grad_()
    loss = ((found @ (W @ A).transpose(1, 2) - C @ W.transpose(1, 2)) ** 2).sum() + 0.3 * (found**2).sum()
    assert torch.autograd.grad(loss, found)[0].abs().max() < 1e-9
    assert loss < ((C @ (W @ A).transpose(1, 2) - C @ W.transpose(1, 2)) ** 2).sum() + 0.3 * (C**2).sum()


def test_rece_is_its_two_steps_layer_by_layer(tiny_sd):
    pipe = tiny_sd("1")
    original = text_layers(pipe)
    kept = torch.cat([tokens(pipe, name)[0] for name in ("", TARGET, *RETAIN)])
    old, new = paper_sequences(pipe, CONCEPT, TARGET)
    first = {name: uce_layer(W, old, new, kept, 0.5, 1.0, 0.1) for name, W in original.items()}
    c, g = tokens(pipe, CONCEPT)[0], tokens(pipe, TARGET)[0]
    left = 1e-3 * torch.eye(c.shape[1]).double() + sum(first[name].T @ first[name] for name in first)
    adversarial = (torch.inverse(left) @ sum(first[name].T @ original[name] for name in first) @ c.T).T
    run("rece", pipe)
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(first[name], adversarial, g, kept, 0.1, 1.0, 0.1), atol=1e-5)
        assert not torch.allclose(W, first[name], atol=1e-4)


@pytest.mark.slow
def test_reces_rounds_go_on_from_the_edit_inside(tiny_sd, monkeypatch):
    """Keys and values are the formulas', from the name's edit on; all else is the edit inside."""
    fewer = partial(erase_concept, pictures=4)  # not 32
    monkeypatch.setattr("more_hf_bench.methods.diffusion.ours.erase_concept", fewer)
    inside, pipe = tiny_sd("1"), tiny_sd("1")
    original = text_layers(pipe)
    run("more-denoiser", inside, sampling_steps=2)
    first = text_layers(inside)
    run("more-denoiser-rece", pipe, sampling_steps=2, rho=0.1, lamb=0.2)
    assert changed(pipe, state(inside)) == {f"unet.{name}" for name in first}
    kept = torch.cat([tokens(pipe, name)[0] for name in ("", TARGET, *RETAIN)])
    c, g = tokens(pipe, CONCEPT)[0], tokens(pipe, TARGET)[0]
    left = 0.1 * torch.eye(c.shape[1]).double() + sum(first[name].T @ first[name] for name in first)
    adversarial = (torch.inverse(left) @ sum(first[name].T @ original[name] for name in first) @ c.T).T
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(first[name], adversarial, g, kept, 0.2, 1.0, 0.1), atol=1e-4)
        assert not torch.allclose(W, first[name], atol=1e-3)


def test_cure_projects_orthogonal_embeddings_out_and_spares_shared_ones():
    e = torch.eye(3).double()
    assert torch.allclose(cure_eraser(e[:1], e[1:2], 2.0), torch.diag(torch.tensor([0.0, 1, 1]).double()))
    assert torch.allclose(cure_eraser(e[:1], 5 * e[:1], 2.0), e)
    # two directions with half of the energy each: λ = 2 · ½ / (½ + 1)
    third = torch.tensor([1 / 3, 1 / 3, 1]).double()
    assert torch.allclose(cure_eraser(e[:2], e[:0], 2.0), torch.diag(third))
    # P_f P_r with a retained direction at 45 degrees
    both = cure_eraser(e[:1], (e[:1] + e[1:2]), 2.0)
    assert torch.allclose(both, torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]).double())


def test_cure_is_the_formula_on_content_tokens(tiny_sd):
    pipe = tiny_sd("2")
    before = text_layers(pipe)

    def projector(names):
        read = [tokens(pipe, name) for name in names]
        rows = np.concatenate([features[1 : used - 1].numpy() for features, used in read])
        values, vectors = np.linalg.eigh(rows.T @ rows)  # squares of the singular values
        share = values.clip(0) / values.sum()
        return vectors @ np.diag(2 * share / (share + 1)) @ vectors.T

    P_f, P_r = projector([CONCEPT]), projector([TARGET, *RETAIN])
    run("cure", pipe)
    for name, W in text_layers(pipe).items():
        assert np.allclose(W.numpy(), before[name].numpy() @ (np.eye(32) - (P_f - P_f @ P_r)), atol=1e-6)


def test_speed_update_is_the_constrained_least_squares_solution():
    torch.manual_seed(0)
    d = 8
    c, g, K = torch.randn(d).double(), torch.randn(d).double(), torch.randn(d, 2).double()
    R = torch.randn(3, d).double()
    P = null_space(R, 1e-9)
    change = speed_update(torch.outer(c, c), torch.outer(g, c), P, K, 0.7, 0.0)
    # Rows of ΔW are in the range of P and orthogonal to P K: ridge regression on g − c in a basis of that.
    basis = torch.linalg.svd(torch.cat([R, (P @ K).T])).Vh[5:].T
    z = basis.T @ c
    ridge = torch.inverse(torch.outer(z, z) + 0.7 * torch.eye(3).double())
    assert torch.allclose(change, torch.outer(g - c, z) @ ridge @ basis.T, atol=1e-10)
    assert (change @ K).abs().max() < 1e-10
    assert (change @ R.T).abs().max() < 1e-10
    assert (change @ c).norm() > 0.1


def test_speed_prior_keeps_what_the_edit_would_hurt():
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


def test_speed_noise_is_along_the_weakest_direction_that_the_layer_sees():
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
def test_speed_centroids_are_the_best_of_all_partitions(seed):
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


def test_speed_centroids_of_few_points_are_the_points():
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


def test_speed_is_the_formula_layer_by_layer(tiny_sd):
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


def test_speed_leaves_begin_token_and_retained_names_exactly(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    run("speed", pipe, threshold=1e-9, prior_filter=False)
    stays = [tokens(pipe, "")[0][0], *(last(pipe, name) for name in (TARGET, *RETAIN))]
    for name, W in text_layers(pipe, ("to_v",)).items():
        change = W - before[name]
        assert all((change @ z).norm() < 1e-5 * (before[name] @ z).norm() for z in stays)
        assert (change @ last(pipe, CONCEPT)).norm() > 1e-2 * (before[name] @ last(pipe, CONCEPT)).norm()


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
