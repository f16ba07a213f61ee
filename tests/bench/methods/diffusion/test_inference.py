"""Methods that act while the pipeline runs: what holds for all, the controls, and SLD against its loop."""

import inspect
import math

import diffusers
import pytest
import torch
from support.compare import same, state
from support.methods import CONCEPT, NAMED, OTHER, draw, run
from support.texts import encode

from more_hf.core.errors import MoreError, SiteNotFoundError
from more_hf_bench.methods.diffusion.inference import PRESETS, noise_like, safety_guidance
from more_hf_bench.methods.diffusion.pipelines import alpha_bar, noise_per_output
from more_hf_bench.methods.registry import DIFFUSION


METHODS = ["noise", "negative_prompt", "sld-weak", "sld-medium", "sld-strong", "sld-max", "safree"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "version"), [*zip(METHODS, "1212121", strict=True), ("sld-medium", "1"), ("safree", "2")]
)
def test_moves_the_concept_row_by_row_and_leaves_the_pipeline_alone(tiny_sd, name, version):
    pipe = tiny_sd(version)
    before = state(pipe.unet)
    plain, torch_state = draw(pipe, [NAMED]), torch.get_rng_state()
    guarded = run(name, pipe, **({"warmup": 0} if name.startswith("sld") else {}))
    assert guarded.unet is pipe.unet
    single, both = draw(guarded, [NAMED]), draw(guarded, [OTHER, NAMED])
    assert torch.allclose(both[1], single[0], atol=1e-3)
    assert (single - plain).abs().max() > 0.05
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(draw(pipe, [NAMED]), plain)
    assert same(pipe.unet, before)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("name", METHODS)
def test_is_called_like_any_pipeline(tiny_sd, name):
    pipe = run(name, tiny_sd("2"))
    ask = {"num_inference_steps": 1, "guidance_scale": 1.0, "num_images_per_prompt": 2}
    images = pipe(NAMED, **ask, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()
    parameters = inspect.signature(DIFFUSION[name].load()).parameters
    assert list(parameters)[:4] == ["pipe", "concepts", "remap_to", "retain"]


def test_other_pipelines_are_refused(tiny_sd):
    parts = tiny_sd("1").components
    with pytest.raises(SiteNotFoundError, match="StableDiffusionImg2ImgPipeline"):
        run("noise", diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


def test_prediction_conversion(tiny_sd):
    scheduler = tiny_sd("2").scheduler
    bars = scheduler.alphas_cumprod
    assert alpha_bar(scheduler, torch.tensor(500)) == pytest.approx(float(bars[500]))
    assert alpha_bar(scheduler, 500.25) == pytest.approx(float(0.75 * bars[500] + 0.25 * bars[501]))
    assert alpha_bar(scheduler, 999.0) == pytest.approx(float(bars[999]))
    assert noise_per_output(scheduler, 300) == pytest.approx(math.sqrt(float(bars[300])))
    assert noise_per_output(tiny_sd("1").scheduler, 300) == 1
    with pytest.raises(MoreError, match="sample"):
        noise_per_output(diffusers.DDIMScheduler(prediction_type="sample"), 300)


def test_noise_replaces_the_features_of_prompts_that_name_the_concept(tiny_sd):
    pipe = tiny_sd("1")
    guarded = run("noise", pipe)
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
    guarded = run("negative_prompt", pipe)
    assert torch.equal(draw(guarded, [NAMED]), draw(pipe, [NAMED], negative_prompt=[CONCEPT]))
    both = draw(pipe, [NAMED], negative_prompt=[f"tree, {CONCEPT}"])
    assert torch.equal(draw(guarded, [NAMED], negative_prompt="tree"), both)
    assert torch.equal(draw(guarded, [NAMED], guidance_scale=1.0), draw(pipe, [NAMED], guidance_scale=1.0))


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
    assert torch.allclose(draw(run("sld-max", pipe, scale=0.0), [NAMED]), plain, atol=1e-4)
    assert torch.allclose(draw(run("sld-max", pipe, warmup=100), [NAMED]), plain, atol=1e-4)
    assert not torch.allclose(draw(run("sld-max", pipe), [NAMED]), plain, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
def test_sld_is_its_loop_in_noise(tiny_sd, version):
    """Noise predictions made from v by hand, SLD on them, and back."""
    pipe, steps, w = tiny_sd(version), 5, 7.5
    pipe.scheduler = scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"scale": 40.0, "threshold": 0.002, "momentum_scale": 0.3, "momentum_beta": 0.4}
    settings["warmup"] = 20  # acts from the third step on
    found = draw(run("sld-medium", pipe, **settings), [NAMED], steps=steps, latents=start)

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
