"""The index of information, against closed forms."""

import math

import pytest
import torch

from more_hf_bench.classes.heads import difference_index, information


def test_index_by_hand():
    original, retrained = [0.5, 0.9, 0.8], [0.4, 0.2, 0.8]
    assert difference_index(original, original, retrained) == 1
    assert difference_index(retrained, original, retrained) == 0
    # 0.1 of 0.8 in the first block, 0.35 in the second; what is below Retrain does not count against.
    assert difference_index([0.6, 0.45, 0.1], original, retrained) == pytest.approx((0.2 + 0.25) / 0.8)
    assert difference_index(original, retrained, retrained) is None


@pytest.mark.parametrize("flipped", [0.0, 0.1, 0.5])
def test_information_of_a_channel_that_flips_bits(flipped):
    """I(Z; Y) = 1 − H(flipped) for a fair Y that is flipped on its way to Z, beside a column of noise."""
    generator = torch.Generator().manual_seed(0)
    features, forgotten = {}, {}
    for part in ("train", "test"):
        y = torch.rand(4000, generator=generator) < 0.5
        z = y ^ (torch.rand(4000, generator=generator) < flipped)
        features[part] = torch.stack([z.float(), torch.randn(4000, generator=generator)], dim=1)
        forgotten[part] = y
    lost = -sum(p * math.log2(p) for p in (flipped, 1 - flipped) if p)
    found = information(features, forgotten, hidden=32, epochs=10)
    assert found == pytest.approx(1 - lost, abs=0.04)
