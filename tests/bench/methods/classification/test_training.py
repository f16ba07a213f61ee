"""The training loop, and the methods whose one step is a formula."""

import copy

import pytest
import torch
from support.squares import WIDTH, K, all_of, pixels, unlearn
from torch import nn
from torch.nn.functional import cross_entropy

from more_hf.core.errors import IncompatibleBaseError
from more_hf_bench.methods.classification.training import Training, reinitialised


@pytest.mark.parametrize("name", ["finetune", "neggrad", "neggrad-plus", "l1-sparse"])
def test_one_step_is_the_formula(name, model, splits):
    reference = copy.deepcopy(model).train()
    forget, remain = (cross_entropy(reference(pixels(part)), part.labels) for part in (splits.f, splits.r))
    losses = {
        "finetune": remain,
        "neggrad": -forget,
        "neggrad-plus": 0.95 * remain - 0.05 * forget,
        "l1-sparse": remain + 5e-4 * sum(p.abs().sum() for p in reference.parameters()),
    }
    decay = 0 if name == "neggrad-plus" else 5e-4
    gradients = torch.autograd.grad(losses[name], list(reference.parameters()))
    expected = [p - 0.1 * (g + decay * p) for p, g in zip(reference.parameters(), gradients, strict=True)]
    model = unlearn(name, model, splits, lr=0.1, epochs=1, batch_size=len(splits.r))
    for new, old, wanted in zip(model.parameters(), reference.parameters(), expected, strict=True):
        assert torch.allclose(new, wanted, atol=1e-6)
        assert not torch.equal(new, old)


def test_l1_makes_weights_smaller(model, splits):
    plain = unlearn("finetune", model, splits, batch_size=10)
    sparse = unlearn("l1-sparse", model, splits, alpha=0.01, batch_size=10)
    norms = [sum(p.abs().sum() for p in m.parameters()) for m in (plain, sparse)]
    assert norms[1] < 0.9 * norms[0]


def test_train_refuses_what_is_not_finite(model, splits):
    with pytest.raises(IncompatibleBaseError, match="neggrad, `.*` is not finite"):
        unlearn("neggrad", model, splits, lr=1e30)


def test_dropout_draws_from_the_seed(splits):
    images, labels = all_of(splits)

    def run(seed):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(25, K))
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        training = Training("t", lr=0.1, epochs=2, batch_size=1, seed=seed)
        training.run(model, lambda epoch: [()], lambda: cross_entropy(model(images), labels), optimizer)
        return model[2].weight

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_reinitialised_is_new_and_reproducible(model):
    first, again, other = reinitialised(model, 0), reinitialised(model, 0), reinitialised(model, 1)
    assert torch.equal(first[1].weight, again[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)
    assert not torch.equal(first[1].weight, model[1].weight)
    assert torch.equal(first[2].running_mean, torch.zeros(WIDTH))

    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"image_size": 4, "patch_size": 2}
    vit = ViTForImageClassification(ViTConfig(**sizes))
    names = ("vit.embeddings.cls_token", "classifier.weight")
    for name in names:  # a token has no `reset_parameters`: it comes from the configuration
        drawn = [dict(reinitialised(vit, seed).named_parameters())[name] for seed in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
