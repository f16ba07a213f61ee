"""Latent inversion."""

import pytest
import torch
from support.victims import erase

from more_hf_bench.attacks.pictures.latent import latent, reproduce
from more_hf_bench.attacks.pictures.studio import Pictures


@pytest.mark.slow
def test_the_noise_that_is_found_draws_the_picture_again(tiny_victim):
    pipe = tiny_victim(erase).pipe
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = Pictures(latents, latents, ["{name} cat", "{name} dog"])
    noise, again = reproduce(pipe, shown, "van gogh", steps=10, fixed_point=10)
    assert torch.allclose(again, latents, atol=1e-4)
    assert not torch.allclose(noise, latents, atol=0.1)
    # without the corrections it is another picture, and so it is under another name
    _, rough = reproduce(pipe, shown, "van gogh", steps=10, fixed_point=0)
    assert not torch.allclose(rough, latents, atol=1e-2)
    other, _ = reproduce(pipe, shown, "pablo picasso", steps=10, fixed_point=10)
    assert not torch.allclose(noise, other, atol=1e-3)


def test_it_yields_both_measures_of_both_collections(tiny_victim):
    victim = tiny_victim()
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = Pictures(latents, latents, ["{name} cat", "{name} dog"])
    for kind in ("pictures", "others"):
        victim.studio.once((kind, "van gogh", 2), lambda: shown)
    results = latent(victim, pictures=2, steps=5, fixed_point=12)
    found = {(result.variant, result.measure): result.recovered for result in results}
    assert set(found) == {(v, m) for v in ("forgotten", "remaining") for m in ("psnr", "log-likelihood")}
    assert found["forgotten", "psnr"] > 40
    assert found["forgotten", "log-likelihood"] == found["remaining", "log-likelihood"]
