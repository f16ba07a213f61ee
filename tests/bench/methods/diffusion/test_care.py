"""CARE: its direction and its subtraction by hand, and its hooks in a pipeline."""

import copy

import numpy as np
import pytest
import torch
from support.compare import same, state
from support.methods import CONCEPT, NAMED, NAMES, RETAIN, TARGET, draw
from support.texts import features, last

from more_hf_bench.methods.diffusion.care import Subtraction, care, directions
from more_hf_bench.methods.diffusion.midsteer import cross_attentions


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without(v, t, d, threshold, steepness, ceiling):
    """The formula for one value in numpy; of several concepts, what each takes from the value as it was."""
    left = v.copy()
    for own, direction in zip(t, d, strict=True):
        alike = own @ v / np.linalg.norm(own) / np.linalg.norm(v)
        gate = ceiling / (1 + np.exp(-steepness * (alike - threshold)))
        left -= gate * (direction @ v) / (direction @ direction) * direction
    return left


def test_the_direction_is_the_targets_in_the_metric_of_the_names_to_keep():
    t, B, gamma = normal(2, 5), normal(3, 5, seed=1), 0.3
    S = (B.T @ B / 3 + gamma * B.square().sum(1).mean() * torch.eye(5)).numpy()
    assert np.allclose(directions(t, B, gamma), t.numpy() @ np.linalg.inv(S))
    assert torch.equal(directions(t, B[:0], gamma), t)
    plain = directions(t, B, 1e4)
    assert torch.allclose(torch.cosine_similarity(plain, t), torch.ones(2).double())
    assert torch.cosine_similarity(directions(t, B, 1e-3), t).max() < 0.95


def test_it_subtracts_from_every_position_but_the_first():
    t, d, values = normal(2, 4), normal(2, 4, seed=1), normal(3, 6, 4, seed=2)
    setting = {"threshold": 0.2, "steepness": 5.0, "ceiling": 1.5}
    found = Subtraction(t, d, **setting)(None, (), values)
    assert torch.equal(found[:, 0], values[:, 0])
    for mine, v in zip(found[:, 1:].flatten(0, 1), values[:, 1:].flatten(0, 1), strict=True):
        assert np.allclose(mine, without(v.numpy(), t.numpy(), d.numpy(), **setting))
    # AdaVD with an open gate leaves nothing of the concept.
    projected = Subtraction(t[:1], t[:1], -1.0, 1e3, 1.0)(None, (), values)[:, 1:]
    assert (projected @ t[0]).abs().max() < 1e-9 < (values[:, 1:] @ t[0]).abs().min()


@pytest.mark.parametrize("version", ["1", "2"])
def test_values_lose_it_in_a_denoiser_of_its_own(tiny_sd, version):
    pipe = tiny_sd(version)
    before, plain = state(pipe.unet), draw(pipe, [NAMED])
    setting = {"threshold": 0.5, "steepness": 10.0, "ceiling": 2.0}
    made = care(pipe, CONCEPT, **NAMES, gamma=0.5, **setting)
    assert same(pipe.unet, before)
    assert torch.equal(draw(pipe, [NAMED]), plain)
    assert not torch.allclose(draw(made, [NAMED]), plain, atol=1e-3)
    shut = care(pipe, CONCEPT, **NAMES, threshold=2.0)
    assert torch.allclose(draw(shut, [NAMED]), plain, atol=1e-5)
    c, kept = last(pipe, CONCEPT), torch.stack([last(pipe, name) for name in (TARGET, *RETAIN)])
    z = features(pipe, NAMED)
    # a denoiser that is copied has the hooks, too
    for name, part in cross_attentions(copy.deepcopy(made.unet)).items():
        original = pipe.unet.get_submodule(name).to_v
        W = original.weight.detach().double()
        t = (W @ c)[None]
        d = directions(t, kept @ W.T, 0.5).numpy()
        with torch.no_grad():
            found, values = part.to_v(z)[0, 1:].double(), original(z)[0, 1:].double()
        expected = [without(v, t.numpy(), d, **setting) for v in values.numpy()]
        assert np.allclose(found, np.stack(expected), atol=1e-4)
