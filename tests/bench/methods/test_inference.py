"""Controls, SLD and SAFREE: methods that change no weight. Each against loops written out here."""

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch

from more_hf.bench.methods.diffusion import safree as safree_module
from more_hf.bench.methods.diffusion.controls import noise_like
from more_hf.bench.methods.diffusion.inference import alpha_bar, noise_per_output
from more_hf.bench.methods.diffusion.safree import attenuate, filter_steps, projector, triggers
from more_hf.bench.methods.diffusion.sld import PRESETS, safety_guidance
from more_hf.bench.methods.registry import DIFFUSION
from more_hf.core.errors import MoreError, TargetNotFoundError


CONCEPT = "van gogh"
NAMED, OTHER = "a cat by van gogh in the style of claude monet", "a dog"
METHODS = ["noise", "negative_prompt", "sld-weak", "sld-medium", "sld-strong", "sld-max", "safree"]


def make(name, pipe, **settings):
    return DIFFUSION[name].load()(pipe, CONCEPT, remap_to=["claude monet"], retain=["pablo picasso"], **settings)


def draw(pipe, prompts, steps=3, **settings):
    """Latents, one seed per row."""
    generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
    ask = {"num_inference_steps": steps, "output_type": "latent", "guidance_scale": 7.5, **settings}
    return pipe(prompts, generator=generators, **ask).images


def encode(pipe, text):
    ids = pipe.tokenizer(text, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)


def test_original_is_the_pipeline_itself(tiny_sd):
    pipe = tiny_sd("1")
    assert make("original", pipe) is pipe


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), [*zip(METHODS, "1212121", strict=True), ("sld-medium", "1"), ("safree", "2")])
def test_moves_the_concept_row_by_row_and_leaves_the_pipeline_alone(tiny_sd, name, version):
    pipe = tiny_sd(version)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    plain, state = draw(pipe, [NAMED]), torch.get_rng_state()
    guarded = make(name, pipe, **({"warmup": 0} if name.startswith("sld") else {}))
    assert guarded.unet is pipe.unet
    single, both = draw(guarded, [NAMED]), draw(guarded, [OTHER, NAMED])
    assert torch.allclose(both[1], single[0], atol=1e-3)
    assert (single - plain).abs().max() > 0.05
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw(pipe, [NAMED]), plain)
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("name", METHODS)
def test_is_called_like_any_pipeline(tiny_sd, name):
    pipe = make(name, tiny_sd("2"))
    images = pipe(NAMED, num_inference_steps=1, guidance_scale=1.0, num_images_per_prompt=2, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()
    parameters = inspect.signature(DIFFUSION[name].load()).parameters
    assert list(parameters)[:4] == ["pipe", "concepts", "remap_to", "retain"]


def test_other_pipelines_are_refused(tiny_sd):
    parts = tiny_sd("1").components
    with pytest.raises(TargetNotFoundError, match="StableDiffusionImg2ImgPipeline"):
        make("noise", diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


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
    assert torch.equal(draw(guarded, [NAMED], negative_prompt="tree"), draw(pipe, [NAMED], negative_prompt=[f"tree, {CONCEPT}"]))
    assert torch.equal(draw(guarded, [NAMED], guidance_scale=1.0), draw(pipe, [NAMED], guidance_scale=1.0))


def test_sld_presets_are_the_published_ones():
    table = "weak 15 200 0 0 0 medium 10 1000 .01 .3 .4 strong 7 2000 .025 .5 .7 max 0 5000 1 .5 .7".split()
    rows = {table[i]: [float(x) for x in table[i + 1 : i + 6]] for i in range(0, len(table), 6)}
    assert {name: list(preset.values()) for name, preset in PRESETS.items()} == rows
    with pytest.raises(MoreError, match="preset"):
        DIFFUSION["sld-weak"].load()(None, CONCEPT, remap_to=None, retain=None, preset="hyper")


def test_sld_guidance_by_hand():
    uncond, text, safety, momentum = (torch.tensor(x) for x in ([0.0, 0, 0, 0], [0.3, 1, 0.5, 0.5], [0.2, 2, 0.5, 0.505], [1.0, 0, 2, 0]))
    # differences 0.1, −1, 0, −0.005: the first is above λ = 0.01 and weighs 0, the others min(1, 100 |difference|) = 1, 0, 0.5
    gamma = safety_guidance(uncond, text, safety, momentum, scale=100.0, threshold=0.01, momentum_scale=0.3)
    assert torch.allclose(gamma, torch.tensor([0.3, 2.0, 0.6, 0.2525]), atol=1e-5)


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
    pipe.scheduler = scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"warmup": 20, "scale": 40.0, "threshold": 0.002, "momentum_scale": 0.3, "momentum_beta": 0.4}  # acts from the third step on
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


def test_safree_projector_triggers_and_filter_by_hand():
    X = torch.tensor([[1.0, 2], [1, 2], [0, 0]]).double()  # rank one
    assert torch.allclose(projector(X), torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]]).double())
    away = torch.diag(torch.tensor([0.0, 1]).double())
    masked = torch.tensor([[9.0, 1.0], [9, 1.02], [9, 1.0]]).double()  # distances 1, 1.02, 1
    assert triggers(masked, away, 0.01).tolist() == [False, True, False]
    assert triggers(masked, away, 0.05).tolist() == [False, False, False]
    assert triggers(masked[:1], away, 0.01).tolist() == [False]
    z, moved = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [1, 0]])  # cosines 1 and 0, β = ½
    assert filter_steps(z, moved, 5.5, 3.5) == round(10 / (1 + math.exp(3.5)))
    assert filter_steps(z, -z, 5.5, 3.5) == 10


def test_safree_attenuates_low_frequencies_where_the_projected_prompt_has_more():
    skip = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = attenuate(skip, torch.tensor([False]), 0.5)
    assert torch.equal(found[0], skip[0])
    assert torch.equal(found[2], skip[2])
    spectra = [np.fft.fft2(row.numpy()) for row in skip]  # unshifted: the centre is frequencies 0 and −1
    changed = 0
    for c in range(2):
        for i in (0, -1):
            for j in (0, -1):
                if (spectra[2][c, i, j] - spectra[1][c, i, j]).real <= 0:
                    spectra[1][c, i, j] *= 0.5
                    changed += 1
    assert 0 < changed < 8
    assert torch.allclose(attenuate(skip, torch.tensor([True]), 0.0)[1].mean(dim=(-2, -1)), torch.zeros(2), atol=1e-6)
    assert np.allclose(found[1].numpy(), np.fft.ifft2(spectra[1]).real, atol=1e-5)


@pytest.mark.parametrize("version", ["1", "2"])
def test_safree_projects_its_triggers(tiny_sd, version):
    pipe = tiny_sd(version)
    guarded = make("safree", pipe)
    found, negative = guarded.encode_prompt([OTHER, NAMED], "cpu", 1, True)
    assert torch.equal(negative[0], encode(pipe, CONCEPT)[0][0])
    c = encode(pipe, CONCEPT).pooler_output[0].double().numpy()
    away = np.eye(len(c)) - np.outer(c, c) / (c @ c)
    ids = pipe.tokenizer(NAMED, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
    n = len(pipe.tokenizer(NAMED).input_ids) - 2
    rows = []
    for i in range(n):
        masked = ids.clone()
        masked[0, 1 + i] = 0
        with torch.no_grad():
            rows.append(pipe.text_encoder(masked).pooler_output[0].double().numpy())
    U, values, _ = np.linalg.svd(np.array(rows).T, full_matrices=False)
    U = U[:, values**2 > n * np.finfo(np.float32).eps * values[0] ** 2]
    move = away @ U @ U.T
    far = np.array([np.linalg.norm(away @ row) for row in rows])
    expected = encode(pipe, NAMED)[0][0].double().numpy()
    hit = [i for i in range(n) if far[i] >= 1.01 * np.delete(far, i).mean()]
    cosines = [z @ move @ z / np.linalg.norm(z) / np.linalg.norm(move @ z) for z in expected[: n + 2]]
    for i in hit:
        expected[1 + i] = move @ expected[1 + i]
    assert 0 < len(hit) < n
    assert np.allclose(found[1].numpy(), expected, atol=1e-4)
    beta = 1 - np.mean(cosines)
    assert guarded.projected_steps[1] == round(10 / (1 + math.exp(-7 * (10 * beta - 5.5))))


def test_safree_uses_the_projected_prompt_for_the_first_steps(tiny_sd):
    pipe = tiny_sd("1")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    reads, layer = [], pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    handle = layer.register_forward_pre_hook(lambda _, args: reads.append(args[0].clone()))
    plain = encode(pipe, NAMED)[0][0]
    for midpoint, expected in ((-100.0, [True, True, False, False, False]), (100.0, [True, False, False, False, False])):
        guarded = make("safree", pipe, midpoint=midpoint)  # 10 and 0 of 50 steps; steps of this run are 0, 10, 20, 30, 40
        reads.clear()
        draw(guarded, [NAMED], steps=5)
        assert [not torch.allclose(read[-1], plain, atol=1e-5) for read in reads] == expected
        assert all(len(read) == 2 for read in reads)
    handle.remove()


def test_safree_without_triggers_is_the_pipeline(tiny_sd, monkeypatch):
    pipe = tiny_sd("2")
    plain = draw(pipe, [NAMED])
    assert torch.allclose(draw(make("safree", pipe, alpha=1e3, negative=False), [NAMED]), plain, atol=1e-5)
    once, again = make("safree", pipe, negative=False), make("safree", pipe, negative=False, re_attention=True)
    projected = draw(once, [NAMED])
    assert not torch.allclose(projected, plain, atol=1e-3)
    assert not torch.allclose(draw(again, [NAMED]), projected, atol=1e-3)
    assert torch.allclose(draw(again, [OTHER, NAMED])[1], draw(again, [NAMED])[0], atol=1e-4)
    assert not any(block._forward_pre_hooks for block in pipe.unet.up_blocks)
    monkeypatch.setattr(safree_module, "SKIP_SCALES", (1.0, 1.0))
    assert torch.allclose(draw(again, [NAMED]), projected, atol=1e-4)
