"""Comparisons that several tests make."""

import torch


def accuracies(model, digits):
    """Percent of every class in the held-out digits."""
    images, labels = digits[0][1200:], digits[1][1200:]
    with torch.no_grad():
        predicted = model.eval()(images).logits.argmax(1)
    return torch.stack([100 * (predicted[labels == i] == i).float().mean() for i in range(10)])


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(model, before):
    """Names of what is not bit for bit as it was."""
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def same(model, before):
    return model.state_dict().keys() == before.keys() and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )
