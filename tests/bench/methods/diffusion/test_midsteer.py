"""MidSteer: its matrix against the paper's formula, and its hooks against the map."""

import copy

import numpy as np
import pytest
import torch
from support.compare import same, state
from support.methods import CONCEPT, NAMED, NAMES, OTHER, TARGET, draw

from more_hf_bench.methods.diffusion.midsteer import (
    Map,
    Steering,
    cross_attentions,
    listening,
    midsteer,
    prompted,
)


FEW = {"pictures": 4, "sampling_steps": 3, "guidance": 3.0}


@pytest.fixture(autouse=True)
def few_ordinary_prompts(monkeypatch):
    prompts = ("a dog and a tree", "a house", "a car", "a cat by claude monet")
    monkeypatch.setattr(
        "more_hf_bench.methods.diffusion.midsteer.everyday_prompts", lambda tokenizer: prompts
    )


def test_it_is_the_papers_matrix():
    """A = I + β Σ^½ (u₂ − u₁) u₁⁺ Σ^−½ of x − μ, with u = Σ^−½ (m − μ); that is also our dual without PO
    (`test_without_po_and_centered_it_is_midsteer`)."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 3
    concept, target = rng.normal(size=(2, 6)) + 3
    mean, S = X.mean(0), np.cov(X.T, bias=True)
    values, vectors = np.linalg.eigh(S)
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    u_1, u_2 = inverse @ (concept - mean), inverse @ (target - mean)
    expected = root @ np.outer(u_2 - u_1, np.linalg.pinv(u_1[:, None])[0]) @ inverse
    fitted = Map.fit(*map(torch.from_numpy, (concept, target, mean, S)))
    assert np.allclose(np.outer(fitted.shift, fitted.reader), expected, atol=1e-10)
    assert float(fitted.reader @ torch.from_numpy(concept - mean)) == pytest.approx(1)


def steered(x, t, clipped, strength=1.0):
    """A denoiser of one attention, which writes `x`, at timestep `t`; and its maps of two timesteps."""
    ends = torch.eye(3)
    maps = {("", float(step)): [Map(step * ends[0], ends[1], ends[2])] for step in (1, 9)}
    steering = Steering(maps, strength, clipped)
    steering.see(None, (torch.arange(len(x)).float(), t))
    return steering.steer("", None, (), x)


def test_each_row_gets_the_map_of_its_own_step_and_clipping_spares_what_is_below_the_mean():
    x = torch.tensor([[[0.0, 2.0, 0.0]], [[0.0, -2.0, 0.0]], [[5.0, 2.0, 0.0]]])
    assert torch.equal(steered(x, 1, clipped=False)[..., 2], x[..., 1])
    assert torch.equal(steered(x, torch.tensor([1, 9, 9]), clipped=True, strength=3.0)[..., 2],
                       torch.tensor([[6.0], [0.0], [6.0]]))  # fmt: skip
    assert prompted(torch.tensor([1.0, 2, 1, 2])).start == 2
    assert [prompted(torch.tensor(rows)).start for rows in ([1.0], [1.0, 2.0], [1.0, 1.0, 1.0])] == [0] * 3


def test_the_concepts_mean_becomes_the_targets_and_the_pipeline_stays(tiny_sd):
    pipe = tiny_sd("1")
    before, plain = state(pipe.unet), draw(pipe, [NAMED])
    made = midsteer(pipe, CONCEPT, **NAMES, **FEW)
    assert same(pipe.unet, before)
    assert torch.equal(draw(pipe, [NAMED]), plain)
    assert not torch.allclose(draw(made, [NAMED]), plain, atol=1e-2)
    # a denoiser that is copied is steered, too
    copied = copy.copy(made)
    copied.register_modules(unet=copy.deepcopy(made.unet))
    assert torch.equal(draw(copied, [OTHER]), draw(made, [OTHER]))
    # The steered attention answers the concept's mean with the target's: listen to one before and after.
    steering = next(iter(made.unet._forward_pre_hooks.values())).__self__
    (layer, (of_steps, *_)) = next(iter(steering.maps.items()))
    steering.see(None, (torch.zeros(1), steering.timesteps[0]))
    found = {}
    with listening(pipe.unet, CONCEPT, found):
        draw(pipe, [f"a cat by {CONCEPT}"], steps=3)
    assert {place[0] for place in found} == set(cross_attentions(pipe.unet)) == set(steering.maps)
    concept = of_steps.mean[0] + of_steps.reader[0] / (of_steps.reader[0] ** 2).sum()  # reads 1
    moved = steering.steer(layer, None, (), concept[None])
    assert torch.allclose(moved[0], concept + of_steps.shift[0], atol=1e-4)


def test_without_strength_it_is_the_pipeline_and_without_a_target_the_concept_becomes_the_mean(tiny_sd):
    pipe = tiny_sd("2")
    plain = draw(pipe, [NAMED])
    assert torch.allclose(
        draw(midsteer(pipe, CONCEPT, **NAMES, strength=0.0, **FEW), [NAMED]), plain, atol=1e-4
    )
    made = midsteer(pipe, CONCEPT, remap_to=None, retain=[TARGET], **FEW)
    steering = next(iter(made.unet._forward_pre_hooks.values())).__self__
    for of_steps, *_ in steering.maps.values():
        # shift = μ − m_f, and the reader is 1 at m_f
        assert torch.allclose((of_steps.reader * -of_steps.shift).sum(-1), torch.ones(3, 1), atol=1e-3)
