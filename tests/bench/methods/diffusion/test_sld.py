"""SLD, against its loop written out here."""

import diffusers
import pytest
import torch
from support.guarded import CONCEPT, NAMED, draw, make
from support.texts import encode

from more_hf.core.errors import MoreError
from more_hf_bench.methods.diffusion.sld import PRESETS, safety_guidance
from more_hf_bench.methods.registry import DIFFUSION


def test_sld_presets_are_the_published_ones():
    table = "weak 15 200 0 0 0 medium 10 1000 .01 .3 .4 strong 7 2000 .025 .5 .7 max 0 5000 1 .5 .7".split()
    rows = {table[i]: [float(x) for x in table[i + 1 : i + 6]] for i in range(0, len(table), 6)}
    assert {name: list(preset.values()) for name, preset in PRESETS.items()} == rows
    with pytest.raises(MoreError, match="preset"):
        DIFFUSION["sld-weak"].load()(None, CONCEPT, remap_to=None, retain=None, preset="hyper")


def test_sld_guidance_by_hand():
    uncond, momentum = torch.tensor([0.0, 0, 0, 0]), torch.tensor([1.0, 0, 2, 0])
    text, safety = torch.tensor([0.3, 1, 0.5, 0.5]), torch.tensor([0.2, 2, 0.5, 0.505])
    # The differences are 0.1, −1, 0, −0.005: the first is above λ = 0.01 and weighs 0, the others weigh
    # min(1, 100 |difference|) = 1, 0, 0.5.
    gamma = safety_guidance(uncond, text, safety, momentum, scale=100.0, threshold=0.01, momentum_scale=0.3)
    assert torch.allclose(gamma, torch.tensor([0.3, 2.0, 0.6, 0.2525]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
def test_sld_with_scale_zero_is_the_pipeline(tiny_sd, version):
    pipe = tiny_sd(version)
    plain = draw(pipe, [NAMED])
    assert torch.allclose(draw(make("sld-max", pipe, scale=0.0), [NAMED]), plain, atol=1e-4)
    assert torch.allclose(draw(make("sld-max", pipe, warmup=100), [NAMED]), plain, atol=1e-4)
    assert not torch.allclose(draw(make("sld-max", pipe), [NAMED]), plain, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
def test_sld_is_its_loop_in_noise(tiny_sd, version):
    """Noise predictions made from v by hand, SLD on them, and back."""
    pipe, steps, w = tiny_sd(version), 5, 7.5
    pipe.scheduler = scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {
        "warmup": 20,  # acts from the third step on
        "scale": 40.0,
        "threshold": 0.002,
        "momentum_scale": 0.3,
        "momentum_beta": 0.4,
    }
    found = draw(make("sld-medium", pipe, **settings), [NAMED], steps=steps, latents=start)

    x, nu = start.clone(), torch.zeros_like(start)
    scheduler.set_timesteps(steps)
    texts = [encode(pipe, text)[0] for text in ("", NAMED, CONCEPT)]
    acted = 0
    for i, t in enumerate(scheduler.timesteps):
        a, s = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5
        with torch.no_grad():
            raw = [pipe.unet(x, t, z).sample for z in texts]
        e0, ep, es = [a * v + s * x for v in raw] if version == "2" else raw
        mu = ((ep - es).abs() * 40).clamp(max=1) * (ep - es < 0.002)
        gamma = mu * (es - e0) + 0.3 * nu
        nu = 0.4 * nu + 0.6 * gamma
        e = e0 + w * ((ep - e0) - (gamma if i >= 2 else 0))
        acted += float(gamma.abs().max()) > 1e-3
        x = scheduler.step((e - s * x) / a if version == "2" else e, t, x).prev_sample
    assert acted == steps
    assert torch.allclose(found, x, atol=1e-3)
    assert not torch.allclose(found, draw(pipe, [NAMED], steps=steps, latents=start), atol=1e-2)
