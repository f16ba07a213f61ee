"""What the files alone give."""

import torch
from support.victims import erase, outputs

from more_hf_bench.attacks.pictures.base import (
    base,
    earlier_features,
    rank_of_name,
    with_base,
    with_noisy_encoder,
)
from more_hf_bench.attacks.pictures.training import encode


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
