"""Methods that train on the data themselves, random labels, SalUn and Fisher forgetting."""

import copy

import torch
from support.compare import state
from support.squares import FORGET, K, pixels, unlearn
from torch import nn
from torch.nn.functional import cross_entropy

from more_hf_bench.methods.classification.gradients import fisher_information, relabelled, salient, salun
from more_hf_bench.methods.classification.training import Training
from more_hf_bench.splits import ImageSet


def test_random_labels_are_uniform_and_own_labels_on_what_remains(model, splits):
    training = Training("t", seed=0, lr=0.1, epochs=1, batch_size=256)
    steps, _ = relabelled(model, splits, training)
    first, *rest = steps(0)
    assert first[1] is None
    assert len(first[0]) == len(splits.f)
    assert sorted(torch.cat([labels for _, labels in rest]).tolist()) == sorted(splits.r.labels.tolist())
    # zero logits, k classes: whatever the labels are, the gradient of the bias is 1/k − their shares
    flat = nn.Sequential(nn.Flatten(), nn.Linear(25, K))
    for parameter in flat.parameters():
        nn.init.zeros_(parameter)
    _, loss = relabelled(flat, splits, training)
    (gradient,) = torch.autograd.grad(loss(torch.zeros(4000, 1, 5, 5), None), flat[1].bias)
    assert (gradient.abs() < 0.03).all()
    assert (gradient != 0).any()


def test_salun_ranks_all_weights_together_and_freezes_the_rest_bit_for_bit(model, splits):
    reference = copy.deepcopy(model).eval()
    # Four batches of ten, summed.
    loss = 40 / 10 * cross_entropy(reference(pixels(splits.f)), splits.f.labels)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    threshold = torch.cat([g.abs().flatten() for g in gradients]).quantile(0.8)
    masks = salient(model, splits, share=0.2, batch_size=10)
    for g, mask in zip(gradients, masks.values(), strict=True):
        sure = (g.abs() - threshold).abs() > 1e-4 * threshold
        assert torch.equal((g.abs() > threshold)[sure], mask[sure])
    before = state(model)
    salun(model, splits, share=0.2, epochs=2, batch_size=10)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~masks[name]], before[name][~masks[name]])
    assert (model[1].weight != before["1.weight"])[masks["1.weight"]].float().mean() > 0.95


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
    model = unlearn("fisher", model, splits, alpha=1e-6, samples=50)
    body = model[1].weight - before["1.weight"]
    expected = (1e-6 * (1 / (information["1.weight"] + 1e-8)).clamp_max(1e3)).sqrt()
    assert abs((body / expected).std() - 1) < 0.05
    head = (model[-1].weight - before["4.weight"])[[0, 1, 3]]
    expected = (10 * 1e-6 * (1 / (information["4.weight"] + 1e-8)).clamp_max(1e2)).sqrt()[[0, 1, 3]]
    assert abs((head / expected).std() - 1) < 0.15
    assert model[-1].weight[FORGET].abs().max() < 0.06
    assert before["4.weight"][FORGET].abs().max() > 0.06
