"""What holds for every method that changes no weight."""

import inspect
import math

import diffusers
import pytest
import torch
from support.compare import same, state
from support.guarded import NAMED, OTHER, draw, make

from more_hf.core.errors import MoreError, SiteNotFoundError
from more_hf_bench.methods.diffusion.inference import alpha_bar, noise_per_output
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
    guarded = make(name, pipe, **({"warmup": 0} if name.startswith("sld") else {}))
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
    pipe = make(name, tiny_sd("2"))
    images = pipe(
        NAMED, num_inference_steps=1, guidance_scale=1.0, num_images_per_prompt=2, output_type="pt"
    ).images
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()
    parameters = inspect.signature(DIFFUSION[name].load()).parameters
    assert list(parameters)[:4] == ["pipe", "concepts", "remap_to", "retain"]


def test_other_pipelines_are_refused(tiny_sd):
    parts = tiny_sd("1").components
    with pytest.raises(SiteNotFoundError, match="StableDiffusionImg2ImgPipeline"):
        make("noise", diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


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
