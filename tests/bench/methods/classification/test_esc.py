"""ESC and ESC-T."""

import copy

import pytest
import torch
from support.squares import head_inputs, pixels
from torch.nn.functional import cross_entropy

from more_hf.core.errors import MoreError
from more_hf_bench.methods.classification import esc_t
from more_hf_bench.methods.registry import CLASSIFICATION


def test_esc_is_the_projection_of_a_full_svd(model, splits):
    Z = head_inputs(model, splits.f)
    U = torch.linalg.svd(Z.T, full_matrices=True).U[:, 1:]  # d 70, 1.5 %: one direction
    edited = CLASSIFICATION["esc"].load()(copy.deepcopy(model), splits)
    for part in (splits.f, splits.r):
        assert torch.allclose(head_inputs(edited, part), head_inputs(model, part) @ U @ U.T, atol=1e-5)
    wider = CLASSIFICATION["esc"].load()(copy.deepcopy(model), splits, percent=3.0)
    U = torch.linalg.svd(Z.T, full_matrices=True).U[:, 2:]
    assert torch.allclose(head_inputs(wider, splits.f), Z @ U @ U.T, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["esc", "esc-t"])
def test_released_mode_overwrites_batch_norm_and_eval_does_not(name, model, splits):
    before = model[2].running_mean.clone()
    clean = CLASSIFICATION[name].load()(copy.deepcopy(model), splits, batch_size=4)
    released = CLASSIFICATION[f"{name}-as-released"].load()(copy.deepcopy(model), splits, batch_size=4)
    assert torch.equal(clean[2].running_mean, before)
    hidden = model[1](pixels(splits.f).flatten(1))
    drift = (released[2].running_mean - hidden.mean(0)).norm() / (before - hidden.mean(0)).norm()
    # Ten batches leave 0.9^10 of the old value, and ESC-T reads twice.
    assert drift < (0.6 if name == "esc" else 0.4)
    with pytest.raises(MoreError, match="mode 'train'.*'eval', 'as_released'"):
        CLASSIFICATION[name].load()(model, splits, mode="train")


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
    found = esc_t.step(Z, labels, U, torch.ones(6, 6).double(), W, b, lr=0.1)
    assert torch.allclose(found, expected)
    assert 0 < (found < 1).sum() < 36
