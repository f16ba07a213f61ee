"""Random labels and SalUn."""

import copy

import torch
from support.compare import state
from support.squares import K, pixels
from torch import nn
from torch.nn.functional import cross_entropy

from more_hf_bench.methods.classification import salun
from more_hf_bench.methods.classification.random_labels import relabelled


def test_random_labels_are_uniform_and_own_labels_on_what_remains(model, splits):
    steps, _ = relabelled(model, splits, 256, seed=0)
    first, *rest = steps(0)
    assert first[1] is None
    assert len(first[0]) == len(splits.f)
    assert sorted(torch.cat([labels for _, labels in rest]).tolist()) == sorted(splits.r.labels.tolist())
    # zero logits, k classes: whatever the labels are, the gradient of the bias is 1/k − their shares
    flat = nn.Sequential(nn.Flatten(), nn.Linear(25, K))
    for parameter in flat.parameters():
        nn.init.zeros_(parameter)
    _, loss = relabelled(flat, splits, 256, seed=0)
    (gradient,) = torch.autograd.grad(loss(torch.zeros(4000, 1, 5, 5), None), flat[1].bias)
    assert (gradient.abs() < 0.03).all()
    assert (gradient != 0).any()


def test_salun_ranks_all_weights_together_and_freezes_the_rest_bit_for_bit(model, splits):
    reference = copy.deepcopy(model).eval()
    # Four batches of ten, summed.
    loss = 40 / 10 * cross_entropy(reference(pixels(splits.f)), splits.f.labels)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    threshold = torch.cat([g.abs().flatten() for g in gradients]).quantile(0.8)
    masks = salun.salient(model, splits, share=0.2, batch_size=10)
    for g, mask in zip(gradients, masks.values(), strict=True):
        sure = (g.abs() - threshold).abs() > 1e-4 * threshold
        assert torch.equal((g.abs() > threshold)[sure], mask[sure])
    before = state(model)
    salun.salun(model, splits, share=0.2, epochs=2, batch_size=10)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~masks[name]], before[name][~masks[name]])
    assert (model[1].weight != before["1.weight"])[masks["1.weight"]].float().mean() > 0.95
