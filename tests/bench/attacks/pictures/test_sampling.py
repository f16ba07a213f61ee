"""More noise than usual, and the noise that draws a given picture."""

import pytest
import torch
from diffusers import DDIMScheduler
from support.victims import StubJudges, erase

from more_hf_bench.attacks.pictures.sampling import NoisyDDIM, latent, noise, reproduce
from more_hf_bench.attacks.pictures.studio import Pictures


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_it_is_ddim_where_that_is_defined(tiny_sd, version, eta):
    pipe = tiny_sd(version)
    ours = NoisyDDIM.of(pipe, eta, 1.0)
    ddim = DDIMScheduler.from_config(ours.config)
    shape = (2, 4, 8, 8)
    x, output = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    for scheduler in (ours, ddim):
        scheduler.set_timesteps(10)

    def generator():
        return torch.Generator().manual_seed(2)

    for t in ours.timesteps[[0, 5, 9]]:
        step = ours.step(output, t, x, generator=generator()).prev_sample
        theirs = ddim.step(output, t, x, eta=eta, generator=generator()).prev_sample
        assert torch.allclose(step, theirs, atol=1e-5)


def test_more_noise_than_there_is_room_for_is_finite_and_moves(tiny_sd):
    pipe, x = tiny_sd("2"), torch.ones(1, 4, 8, 8)
    steps = []
    for eta, scale in ((1.0, 1.0), (1.85, 1.0), (1.85, 1.04)):
        scheduler = NoisyDDIM.of(pipe, eta, scale)
        scheduler.set_timesteps(2)
        generator = torch.Generator().manual_seed(0)
        steps.append(scheduler.step(x, scheduler.timesteps[0], x, generator=generator).prev_sample)
    assert all(torch.isfinite(step).all() for step in steps)
    assert not torch.allclose(steps[0], steps[1])
    assert not torch.allclose(steps[1], steps[2])


class Picky(StubJudges):
    """Sees the artist in one picture of each call: the first call's first, the second call's second ..."""

    calls = 0

    def judge(self, images, rows):
        self.calls += 1
        return [row.artist * (i == self.calls - 1) for i, row in enumerate(rows)], [1] * len(rows)


def test_the_best_of_all_samplings_counts(tiny_victim):
    victim = tiny_victim(erase)
    victim.studio.judges = Picky()
    found = noise(victim, eta=[1.0, 1.5], variance_scale=[1.0], budgets=[1, 2])
    assert [(result.budget, result.recovered) for result in found] == [(1, 25), (2, 50)]


@pytest.mark.slow
def test_it_finds_more_in_the_original(emoji_victims):
    settings = {"eta": [1.0, 1.5], "variance_scale": [1.0], "budgets": [2]}
    (original,), (erased,) = (noise(emoji_victims[name], **settings) for name in ("original", "erased"))
    assert original.recovered >= 50
    assert erased.recovered < original.recovered


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


@pytest.mark.slow
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
