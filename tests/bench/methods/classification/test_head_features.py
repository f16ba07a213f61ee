"""The features that a head reads."""

import torch
from support.squares import K, head_inputs
from torch.nn.functional import one_hot

from more_hf_bench.methods.classification.head_features import features, find_head


def test_features_come_from_the_input_of_the_head(model, splits):
    name, head = find_head(model, splits.f)
    assert (name, head) == ("4", model[-1])
    z, labels = features(model, head, splits.f.loader(7))
    assert torch.allclose(z, head_inputs(model, splits.f))
    assert torch.equal(labels, splits.f.labels)
    assert torch.equal(one_hot(labels, K).sum(0), torch.tensor([0, 0, 40, 0]))
