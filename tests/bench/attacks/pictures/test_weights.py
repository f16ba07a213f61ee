"""Closed forms of the edited weights, and what surrounds the denoiser."""

import math

import pytest
import torch
from support.victims import erase, outputs

from more_hf.diffusion.encoder import Encoder
from more_hf_bench.attacks.pictures.training import encode
from more_hf_bench.attacks.pictures.weights import (
    angle_to_range,
    base,
    closed_form,
    earlier_features,
    probe,
    rank_of_name,
    stacked,
    with_base,
    with_noisy_encoder,
)


def found(victim):
    results = closed_form(victim, rho=1e-12)
    return {(result.variant, result.measure): result.recovered for result in results}


def test_the_residual_is_that_of_least_squares(tiny_victim):
    victim = tiny_victim(erase)
    encoder = Encoder(victim.studio.original)
    c = torch.cat([encoder.encode([prompt])[0, 1:] for prompt in victim.prompts("van gogh")]).double()
    W, edited = stacked(victim.studio.original), stacked(victim.pipe)
    best = torch.linalg.pinv(edited, rtol=1e-5) @ W @ c.T  # what float32 rounds off is no direction
    nearest = (edited @ best - W @ c.T).norm() / (W @ c.T).norm()
    residuals = found(victim)
    assert residuals["embedding", "residual"] == pytest.approx(float(nearest), rel=1e-2)
    assert residuals["by name", "residual"] > 2 * float(nearest)


def test_nothing_is_missing_in_the_original(tiny_victim):
    numbers = found(tiny_victim())
    assert numbers["by name", "residual"] == 0
    assert numbers["embedding", "residual"] < 1e-4
    assert numbers["", "angle"] < 0.1
    assert numbers["probe of values", "auc"] > 95


def test_the_angle_to_a_range_that_is_known():
    # onto the plane of the first two axes, from a vector 30° above it
    E = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    p = torch.tensor([math.cos(math.radians(30)), 0, math.sin(math.radians(30))], dtype=torch.float64)
    assert angle_to_range(E, p) == pytest.approx(30)
    assert angle_to_range(torch.eye(3, dtype=torch.float64), p) == pytest.approx(0, abs=1e-5)


def test_a_probe_finds_nothing_where_nothing_is(tiny_victim):
    victim = tiny_victim()
    encoder = Encoder(victim.studio.original)
    W = stacked(victim.pipe, "to_v")
    assert probe(victim, W, encoder) > 95
    assert probe(victim, torch.zeros_like(W), encoder) == 50


@pytest.mark.slow
def test_the_adversarial_embedding_draws_what_the_name_does_not(emoji_victims):
    numbers = found(emoji_victims["erased"])
    assert numbers["embedding", "recognised"] >= 30
    assert numbers["embedding", "residual"] < 0.1 * numbers["by name", "residual"]


PROMPTS = ["a cat by van gogh", "a dog by monet"]


def test_the_base_gives_the_original_back(tiny_victim):
    victim = tiny_victim(erase)
    original, features = victim.studio.original, encode(victim.pipe, PROMPTS)
    wanted = outputs(original, features)
    assert torch.allclose(outputs(with_base(victim, 1.0), features), wanted, atol=1e-6)
    assert not torch.allclose(outputs(victim.pipe, features), wanted, atol=1e-4)
    # half of the way lies between
    half = outputs(with_base(victim, 0.5), features)
    assert not torch.allclose(half, wanted, atol=1e-4)


def test_the_difference_names_what_was_erased(tiny_victim):
    assert rank_of_name(tiny_victim(erase)) == 1
    assert rank_of_name(tiny_victim()) is None


def test_without_the_hook_the_mean_expert_is_left(tiny_victim):
    def routed(pipe):
        return erase(pipe, router="hash")

    victim = tiny_victim(routed)
    variants = [result.variant for result in base(victim, added=[], encoder_noise=[], clip_skip=[])]
    assert variants == ["", "hook removed"]
    assert victim.pipe.unet._forward_pre_hooks  # the victim's own is as it was
    plain = tiny_victim(erase)
    assert [result.variant for result in base(plain, added=[], encoder_noise=[], clip_skip=[])] == [""]


def test_hooks_of_layers_are_removed_too(tiny_victim):
    def refuse(*call):
        raise AssertionError("the hook was called")

    victim = tiny_victim(erase)
    victim.pipe.unet.mid_block.register_forward_hook(refuse)
    found = list(base(victim, added=[], encoder_noise=[], clip_skip=[]))
    assert [result.variant for result in found] == ["", "hook removed"]
    with pytest.raises(AssertionError, match="was called"):
        outputs(victim.pipe, encode(victim.pipe, PROMPTS))


def test_features_of_an_earlier_layer(tiny_sd):
    pipe = tiny_sd("1")
    last, earlier = earlier_features(pipe, PROMPTS, 0), earlier_features(pipe, PROMPTS, 1)
    assert torch.allclose(last, encode(pipe, PROMPTS), atol=1e-6)
    assert not torch.allclose(earlier, last, atol=1e-2)


def test_a_noisy_encoder_is_near_and_another(tiny_sd):
    pipe = tiny_sd("1")
    with torch.no_grad():
        own, noisy = encode(pipe, PROMPTS), encode(with_noisy_encoder(pipe, 0.05, 0), PROMPTS)
    assert torch.nn.functional.cosine_similarity(own, noisy, dim=-1).min() > 0.8
    assert not torch.allclose(own, noisy, atol=1e-2)
