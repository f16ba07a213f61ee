"""Boundary shrink."""

import torch
from torch import nn

from more_hf_bench.methods.classification import boundary_shrink


def test_boundary_shrink_attacks_along_the_gradient(splits):
    """Logits ±w·x: the attack moves every pixel by the bound against its class, which has a closed form."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(25, 2, bias=False))
    w = torch.linspace(-1, 1, 25)
    with torch.no_grad():
        flat[1].weight.copy_(torch.stack([w, -w]))
    images = torch.rand(50, 1, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    score = images.flatten(1) @ w
    labels = (score < 0).long()
    moved = (images.flatten(1) - 0.1 * w.sign() * score.sign()[:, None]).clamp(images.min(), images.max()) @ w
    found = boundary_shrink.nearest_class(flat, images, labels, bound=0.1)
    assert torch.equal(found, (moved < 0).long())
    assert (found != labels).any()
    assert (found == labels).any()
