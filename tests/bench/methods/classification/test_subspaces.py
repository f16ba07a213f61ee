"""The features that a head reads, ESC, ESC-T and LEACE."""

import pytest
import torch
from support.squares import K, head_inputs, pixels, unlearn
from torch.nn.functional import cross_entropy, one_hot

from more_hf.core.errors import MoreError
from more_hf_bench.methods.classification.head_features import features, find_head
from more_hf_bench.methods.classification.subspaces import esc_t_step


def test_features_come_from_the_input_of_the_head(model, splits):
    name, head = find_head(model, splits.f)
    assert (name, head) == ("4", model[-1])
    z, labels = features(model, head, splits.f.loader(7))
    assert torch.allclose(z, head_inputs(model, splits.f))
    assert torch.equal(labels, splits.f.labels)
    assert torch.equal(one_hot(labels, K).sum(0), torch.tensor([0, 0, 40, 0]))


def test_esc_is_the_projection_of_a_full_svd(model, splits):
    Z = head_inputs(model, splits.f)
    U = torch.linalg.svd(Z.T, full_matrices=True).U[:, 1:]  # d 70, 1.5 %: one direction
    edited = unlearn("esc", model, splits)
    for part in (splits.f, splits.r):
        assert torch.allclose(head_inputs(edited, part), head_inputs(model, part) @ U @ U.T, atol=1e-5)
    wider = unlearn("esc", model, splits, percent=3.0)
    U = torch.linalg.svd(Z.T, full_matrices=True).U[:, 2:]
    assert torch.allclose(head_inputs(wider, splits.f), Z @ U @ U.T, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["esc", "esc-t"])
def test_released_mode_overwrites_batch_norm_and_eval_does_not(name, model, splits):
    before = model[2].running_mean.clone()
    clean = unlearn(name, model, splits, batch_size=4)
    released = unlearn(f"{name}-as-released", model, splits, batch_size=4)
    assert torch.equal(clean[2].running_mean, before)
    hidden = model[1](pixels(splits.f).flatten(1))
    drift = (released[2].running_mean - hidden.mean(0)).norm() / (before - hidden.mean(0)).norm()
    # Ten batches leave 0.9^10 of the old value, and ESC-T reads twice.
    assert drift < (0.6 if name == "esc" else 0.4)
    with pytest.raises(MoreError, match="mode 'train'.*'eval', 'as_released'"):
        unlearn(name, model, splits, mode="train")


def test_esc_t_step_is_autograd_of_the_whole_layer():
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(30, 6, generator=generator).double()
    U = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    W, b = torch.randn(4, 6, generator=generator).double(), torch.randn(4, generator=generator).double()
    labels = (Z @ W.T + b).argmax(1)
    labels[:10] = (labels[:10] + 1) % 4  # already wrong: they must not count
    mask = torch.ones(6, 6).double().requires_grad_()
    layer = (U * mask) @ (U * mask).T
    loss = -cross_entropy((Z[10:] @ layer.T) @ W.T + b, labels[10:])
    loss.backward()
    expected = (1 - 0.1 * mask.grad).clamp(0, 1)
    found = esc_t_step(Z, labels, U, torch.ones(6, 6).double(), W, b, lr=0.1)
    assert torch.allclose(found, expected)
    assert 0 < (found < 1).sum() < 36


def test_leace_target_equalises_two_means_and_leaves_no_correlation(model, splits):
    edited = unlearn("leace-target", model, splits, target=3)
    target = splits.r.subset(splits.r.labels == 3)
    f, t = head_inputs(edited, splits.f), head_inputs(edited, target)
    gap_before = (head_inputs(model, splits.f).mean(0) - head_inputs(model, target).mean(0)).norm()
    assert (f.mean(0) - t.mean(0)).norm() < 1e-4 * gap_before
    with pytest.raises(MoreError, match=r"Class 2 is not among the remaining classes \[0, 1, 3\]"):
        unlearn("leace-target", model, splits, target=2)
    with pytest.raises(MoreError, match="Unknown contrast 'all'"):
        unlearn("leace-rest", model, splits, against="all")


def test_leace_rest_is_the_least_squares_map(model, splits):
    """Against the theorem: x − W⁺ Q W (x − mean) with W = Σ^(−1/2), from the full covariance."""
    parts = (splits.f, splits.r)
    X = torch.cat([head_inputs(model, part) for part in parts])
    z = torch.cat([torch.ones(len(splits.f)), torch.zeros(len(splits.r))]).double()
    edited = unlearn("leace-rest", model, splits)
    after = torch.cat([head_inputs(edited, part) for part in parts])
    assert (after.mean(0) - X.mean(0)).norm() < 1e-4 * X.mean(0).norm()  # the mean stays
    covariance = (after - after.mean(0)).T @ (z - z.mean())
    covariance_before = (X - X.mean(0)).T @ (z - z.mean())
    assert covariance.norm() < 1e-4 * covariance_before.norm()  # and nothing linear tells f
    assert torch.linalg.matrix_rank(after - X, rtol=1e-4) == 1
