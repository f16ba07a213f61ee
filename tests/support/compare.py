"""Comparisons that several tests make."""

import torch
from torch import nn


def accuracies(model, digits):
    """Percent of every class in the held-out digits."""
    images, labels = digits[0][1200:], digits[1][1200:]
    with torch.no_grad():
        predicted = model.eval()(images).logits.argmax(1)
    return torch.stack([100 * (predicted[labels == i] == i).float().mean() for i in range(10)])


def tensors(model):
    """Name -> tensor, of a module or of every module of a pipeline."""
    if isinstance(model, nn.Module):
        return model.state_dict()
    found = {}
    for part, module in model.components.items():
        if isinstance(module, nn.Module):
            found |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    return found


def state(model):
    """A copy of every tensor."""
    return {name: value.clone() for name, value in tensors(model).items()}


def changed(model, before):
    """Names of what is not bit for bit as it was."""
    return {name for name, value in tensors(model).items() if not torch.equal(value, before[name])}


def assert_proved(erasure):
    """Nothing else reads the prompt, and every layer computes with the edited weight, far from the old."""
    proof = erasure.proof
    assert proof["other_ways"] == proof["spread"] == 0.0
    assert proof["layer_error"] < 4 < proof["layer_changed"]
    assert ("expert_error" in proof) == bool(erasure.hooks)
    assert proof.get("expert_error", 0.0) < 4


def same(model, before):
    return tensors(model).keys() == before.keys() and not changed(model, before)
