"""A small classifier with BatchNorm, and four classes of noisy 5×5 images, one of them to be forgotten."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.splits import ImageSet, KDData, split_by_class


K, WIDTH, FORGET = 4, 70, 2  # 1.5 % of 70 is one direction


def make_splits():
    """Four classes of noisy 5×5 images."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(K, 1, 5, 5, generator=generator)
    labels = torch.arange(K).repeat(40)
    noise = torch.rand(len(labels), 1, 5, 5, generator=generator)
    images = (255 * (0.6 * patterns[labels] + 0.4 * noise)).to(torch.uint8)
    part = ImageSet(images, labels, torch.arange(len(labels)), image_size=5)
    data = KDData("squares", tuple("abcd"), part, part, part, channels=1, flip=False)
    return split_by_class(data, [FORGET])


def train_model(splits):
    """A classifier with BatchNorm that knows all four classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Linear(25, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, K))
        model = nn.Sequential(nn.Flatten(), *layers)
    images, labels = all_of(splits)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    assert accuracy(model, splits.f) == accuracy(model, splits.r) == 1.0
    return model


def all_of(splits):
    parts = [part[torch.arange(len(part))] for part in (splits.f, splits.r)]
    return torch.cat([part["pixel_values"] for part in parts]), torch.cat([part["labels"] for part in parts])


def pixels(part):
    return part[torch.arange(len(part))]["pixel_values"]


@torch.no_grad()
def accuracy(model, part):
    return (model(pixels(part)).argmax(1) == part.labels).float().mean().item()


def head_inputs(model, part):
    """What the head reads, after every map in front of it."""
    seen = []
    handle = model[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(pixels(part))
    handle.remove()
    return seen[0].double()


def remaining(splits, label):
    return splits.r.subset(splits.r.labels == label)


def unlearn(name, model, splits, **settings):
    """A copy of the model after a method of the registry."""
    return CLASSIFICATION[name].load()(copy.deepcopy(model), splits, **settings)
