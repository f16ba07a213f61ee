"""The controls: the original, noise, the negative prompt."""

import torch
from support.guarded import CONCEPT, NAMED, OTHER, draw, make
from support.texts import encode

from more_hf_bench.methods.diffusion.controls import noise_like


def test_original_is_the_pipeline_itself(tiny_sd):
    pipe = tiny_sd("1")
    assert make("original", pipe) is pipe


def test_noise_replaces_the_features_of_prompts_that_name_the_concept(tiny_sd):
    pipe = tiny_sd("1")
    guarded = make("noise", pipe)
    embeds, _ = guarded.encode_prompt([OTHER, NAMED.title(), "a van goghs"], "cpu", 1, False)
    plain = torch.cat([encode(pipe, text)[0] for text in (OTHER, NAMED.title(), "a van goghs")])
    assert torch.equal(embeds[0], plain[0])
    assert torch.equal(embeds[2], plain[2])
    assert torch.allclose(embeds[1].norm(dim=-1), plain[1].norm(dim=-1), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(embeds[1], plain[1], dim=-1)
    assert cosine.mean().abs() < 0.15
    assert torch.equal(noise_like(plain[1], "a"), noise_like(plain[1], "a"))
    assert not torch.allclose(noise_like(plain[1], "a"), noise_like(plain[1], "b"))


def test_negative_prompt_is_the_pipelines_own(tiny_sd):
    pipe = tiny_sd("2")
    guarded = make("negative_prompt", pipe)
    assert torch.equal(draw(guarded, [NAMED]), draw(pipe, [NAMED], negative_prompt=[CONCEPT]))
    assert torch.equal(
        draw(guarded, [NAMED], negative_prompt="tree"),
        draw(pipe, [NAMED], negative_prompt=[f"tree, {CONCEPT}"]),
    )
    assert torch.equal(draw(guarded, [NAMED], guidance_scale=1.0), draw(pipe, [NAMED], guidance_scale=1.0))
