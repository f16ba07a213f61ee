"""Fisher forgetting."""

import copy

import torch
from support.compare import state
from support.squares import FORGET, pixels
from torch import nn

from more_hf_bench.methods.classification.fisher import fisher_information
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.splits import ImageSet


def test_fisher_information_of_a_linear_softmax():
    """One linear layer: ∂ log p(y)/∂W = (onehot(y) − p) xᵀ, whose expected square has a closed form."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 5, 5), generator=generator, dtype=torch.uint8)
    part = ImageSet(images, torch.zeros(60, dtype=torch.int64), torch.arange(60), image_size=5)
    x = pixels(part).flatten(1)
    p = (flat(pixels(part))).softmax(1).detach()
    # E_y (onehot(y) − p)², (n, k)
    error = (p[:, None] * (torch.eye(3)[None] - p[:, None, :]).mT.square()).sum(-1)
    expected = torch.einsum("nk,nd->kd", error, x.square()) / 60
    found = torch.zeros_like(expected)
    for seed in range(20):
        found += fisher_information(flat, part, 60, torch.Generator().manual_seed(seed))["1.weight"] / 20
    assert (found - expected).norm() < 0.15 * expected.norm()
    assert all(parameter.grad is None for parameter in flat.parameters())


def test_fisher_noise_has_the_variance_it_says_and_resets_the_forgotten_row(model, splits):
    before = state(model)
    information = fisher_information(copy.deepcopy(model), splits.r, 50, torch.Generator().manual_seed(0))
    CLASSIFICATION["fisher"].load()(model, splits, alpha=1e-6, samples=50)
    body = model[1].weight - before["1.weight"]
    expected = (1e-6 * (1 / (information["1.weight"] + 1e-8)).clamp_max(1e3)).sqrt()
    assert abs((body / expected).std() - 1) < 0.05
    head = (model[-1].weight - before["4.weight"])[[0, 1, 3]]
    expected = (10 * 1e-6 * (1 / (information["4.weight"] + 1e-8)).clamp_max(1e2)).sqrt()[[0, 1, 3]]
    assert abs((head / expected).std() - 1) < 0.15
    assert model[-1].weight[FORGET].abs().max() < 0.06
    assert before["4.weight"][FORGET].abs().max() > 0.06
