"""ESD: its targets and its loss by hand, and a few steps that reduce it."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from support.methods import CONCEPT, ESD
from support.texts import features

from more_hf.core.errors import MoreError
from more_hf_bench.methods.diffusion import esd as esd_module
from more_hf_bench.methods.diffusion import training
from more_hf_bench.methods.diffusion.esd import esd, sample_until, target


def test_esd_targets_by_hand():
    unguided, guided = torch.tensor([1.0, 0.0]), torch.tensor([3.0, -1.0])
    assert target(unguided, guided, 1.0, "paper").tolist() == [-1.0, 1.0]
    assert target(unguided, guided, 2.0, "repo").tolist() == [-1.0, 1.0]
    assert target(unguided, guided, 1.0, "repo").tolist() == [1.0, 0.0]


def test_esd_target_in_v_is_the_target_in_noise():
    x, v0, vc = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    a, s = 0.6, 0.8
    for variant in ("paper", "repo"):
        in_noise = target(a * v0 + s * x, a * vc + s * x, 1.7, variant)
        assert torch.allclose(a * target(v0, vc, 1.7, variant) + s * x, in_noise, atol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "repo"])
@pytest.mark.parametrize("version", ["1", "2"])
def test_esd_loss_is_the_formula_on_its_own_draws(tiny_sd, monkeypatch, variant, version):
    """What the loss was computed from in the first iteration, computed again from the original."""
    pipe = tiny_sd(version)
    original, seen, copies = copy.deepcopy(pipe.unet), {}, []
    mse, float_copy = torch.nn.functional.mse_loss, esd_module.float_copy

    def copied(pipe):
        copies.append(float_copy(pipe))
        # The last call is the student's, and its t stays.
        copies[-1].register_forward_pre_hook(lambda _, args: seen.update(t=int(args[1])))
        return copies[-1]

    def start(denoiser, sampler, x, empty, text, guidance, level):
        x = sample_until(denoiser, sampler, x, empty, text, guidance, level)
        seen.update(denoiser=denoiser, level=level, x=x)
        return x

    def compared(predicted, wanted):
        seen.update(predicted=predicted.detach(), wanted=wanted)
        return mse(predicted, wanted)

    monkeypatch.setattr(esd_module, "float_copy", copied)
    monkeypatch.setattr(esd_module, "sample_until", start)
    monkeypatch.setattr(torch.nn.functional, "mse_loss", compared)
    esd(pipe, CONCEPT, **{**ESD, "iterations": 1}, variant=variant)

    x, t = seen["x"], seen["t"]
    assert seen["denoiser"] is copies[0 if variant == "paper" else 1]
    if variant == "paper":
        assert seen["level"] * 250 <= t < (seen["level"] + 1) * 250
    empty, concept = features(pipe, ""), features(pipe, CONCEPT)
    with torch.no_grad():
        e0, ec = original(x, t, empty).sample, original(x, t, concept).sample
    assert torch.allclose(seen["predicted"], ec, atol=1e-5)
    expected = e0 - 1.0 * (ec - e0) if variant == "paper" else ec - 2.0 * (ec - e0)
    assert torch.allclose(seen["wanted"], expected, atol=1e-5)
    assert not torch.allclose(seen["wanted"], ec, atol=1e-3)


def test_esd_start_points_are_guided_ddim(tiny_sd):
    pipe = tiny_sd("2")
    sampler = DDIMScheduler.from_config(pipe.scheduler.config)
    sampler.set_timesteps(4)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    empty, concept = features(pipe, "")[0], features(pipe, CONCEPT)[0]
    assert torch.equal(sample_until(pipe.unet, sampler, x, empty, concept, 3.0, 3), x)
    found = sample_until(pipe.unet, sampler, x, empty, concept, 3.0, 1)
    ask = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": x, "output_type": "latent"}
    expected = pipe(CONCEPT, **ask, callback_on_step_end=stop_after(2)).images
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, x, atol=1e-2)


def stop_after(count):
    def callback(pipe, i, t, values):
        pipe._interrupt = i + 1 >= count
        return values

    return callback


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_esd_reduces_its_loss(tiny_sd, variant):
    pipe = tiny_sd("2")
    original = copy.deepcopy(pipe.unet)
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    empty, concept = (features(pipe, text).expand(8, -1, -1) for text in ("", CONCEPT))
    t = torch.arange(50, 1000, 120)[:8]
    with torch.no_grad():
        e0, ec = original(x, t, empty).sample, original(x, t, concept).sample
        wanted = 2 * e0 - ec
        before = (ec - wanted).square().mean()
        esd(pipe, CONCEPT, **{**ESD, "iterations": 12, "learning_rate": 6e-3}, variant=variant)
        after = (pipe.unet(x, t, concept).sample - wanted).square().mean()
    assert after < 0.7 * before


def test_layers_and_words_of_esd(tiny_sd):
    pipe = tiny_sd("1")
    counts = {layers: set(training.trainable_names(pipe, layers)) for layers in training.LAYERS}
    strict = ("attn2.to_k.weight", "attn2.to_v.weight")
    assert counts["x-strict"] == {n for n in counts["all"] if n.endswith(strict)}
    assert counts["x"] == {n for n in counts["all"] if ".attn2." in n}
    assert counts["u"] == counts["all"] - counts["x"]
    assert counts["all"] == {n for n, _ in pipe.unet.named_parameters()}
    for wrong in ({"layers": "noxattn"}, {"variant": "2025"}):
        with pytest.raises(MoreError, match="Unknown"):
            esd(pipe, CONCEPT, **ESD, **wrong)
