"""CA: its anchors and its loss by hand, and a few steps that reduce it."""

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from support.methods import CA, CONCEPT
from support.texts import features

from more_hf.core.errors import MoreError
from more_hf_bench.methods.diffusion.ca import ablation_loss, anchor_texts, ca, detach_begin_token


def test_ca_anchor_texts():
    assert anchor_texts(["a", "b"], [], 3) == [("a", "a"), ("b", "b"), ("a", "a")]
    assert anchor_texts(["a", "b"], ["X", "Y"], 4) == [
        ("a", "a, in the style of X"),
        ("b", "b, in the style of Y"),
        ("a", "a, in the style of Y"),
        ("b", "b, in the style of X"),
    ]


def test_ca_loss_and_its_gradient(tiny_sd):
    """The anchor's side gets no gradient: the gradient is that of a regression on a constant."""
    unet = tiny_sd("1").unet
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    concept, anchor = torch.randn(2, 2, 48, 32, generator=torch.Generator().manual_seed(1))
    weight = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
    wanted = unet(x, t, anchor).sample.detach().clone()
    expected = (unet(x, t, concept).sample - wanted).square().mean()
    found = ablation_loss(unet, x, t, concept, anchor)
    assert torch.allclose(found, expected)
    assert found > 1e-5
    assert torch.allclose(*(torch.autograd.grad(value, weight)[0] for value in (found, expected)))


@pytest.mark.slow
def test_ca_reduces_its_loss(tiny_sd):
    pipe = tiny_sd("2")
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    t = torch.arange(50, 1000, 120)[:8]
    concept, anchor = (
        features(pipe, f"a tree, in the style of {name}").expand(8, -1, -1)
        for name in (CONCEPT, "claude monet")
    )

    def loss():
        with torch.no_grad():
            return (pipe.unet(x, t, concept).sample - pipe.unet(x, t, anchor).sample).square().mean()

    before = loss()
    ca(pipe, CONCEPT, **{**CA, "iterations": 15, "learning_rate": 5e-3})
    assert loss() < 0.5 * before


def test_ca_draws_anchors_once_by_its_recipe(tiny_sd, tmp_path, monkeypatch):
    pipe = tiny_sd("1")
    ca(pipe, CONCEPT, **{**CA, "iterations": 0, "checkpoint": str(tmp_path)})
    held = torch.load(next(tmp_path.glob("ca-anchors-*.pt")), weights_only=True)["latents"]
    assert held.shape == (4, 2, 4, 16, 16)
    drawing = copy.copy(pipe)
    drawing.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    ask = {"num_inference_steps": 2, "guidance_scale": 6.0, "output_type": "pt"}
    generator = torch.Generator().manual_seed(1)
    pixels = 2 * drawing("a tree, in the style of claude monet", generator=generator, **ask).images - 1
    with torch.no_grad():
        for flip, picture in enumerate((pixels, pixels.flip(-1))):
            expected = pipe.vae.encode(picture).latent_dist.mean[0] * pipe.vae.config.scaling_factor
            assert torch.allclose(held[1, flip], expected, atol=1e-4)
    assert not torch.allclose(held[1, 0], held[1, 1], atol=1e-3)
    assert not torch.allclose(held[0], held[1], atol=1e-3)

    def refuse(*args, **kwargs):
        raise AssertionError("drew again")

    monkeypatch.setattr(type(pipe), "__call__", refuse)
    ca(pipe, CONCEPT, **{**CA, "learning_rate": 1e-4, "checkpoint": str(tmp_path)})


def test_ca_gives_the_begin_token_no_gradient():
    layer = torch.nn.Linear(3, 2, bias=False)
    layer.register_forward_hook(detach_begin_token)
    z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(z), z @ layer.weight.T)
    layer(z).sum().backward()
    assert torch.allclose(layer.weight.grad, z[:, 1:].sum((0, 1)).expand(2, -1))


def test_ca_needs_images_and_prompts_with_room_for_a_name(tiny_sd):
    pipe = tiny_sd("1")
    with pytest.raises(MoreError, match="at least one image"):
        ca(pipe, CONCEPT, **{**CA, "images": 0})
    with pytest.raises(MoreError, match="no room"):
        ca(pipe, CONCEPT, **{**CA, "prompts": ["a cat", "a " * 40]})
