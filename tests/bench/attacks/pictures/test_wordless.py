"""The noise behind a picture without words, and a picture as the start."""

import pytest
import torch
from support.victims import erase

from more_hf_bench.attacks.pictures.sampling import NoisyDDIM
from more_hf_bench.attacks.pictures.wordless import drawn_from, drawn_on, filled_in, noise_behind
from more_hf_bench.methods.diffusion.inference import random_weights


@pytest.fixture
def ddim(tiny_sd):
    pipe = tiny_sd("2")
    scheduler = NoisyDDIM.of(pipe, eta=0.0, variance_scale=1.0)
    scheduler.set_timesteps(5)
    return pipe, scheduler, torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_noise_that_is_found_draws_the_picture_again_without_words(ddim):
    pipe, scheduler, picture = ddim
    assert torch.allclose(
        drawn_from(pipe, scheduler, noise_behind(pipe, scheduler, picture, 12)), picture, atol=1e-3
    )
    rough = drawn_from(pipe, scheduler, noise_behind(pipe, scheduler, picture, 0))
    assert not torch.allclose(rough, picture, atol=1e-2)


def test_the_bound_holds_where_it_is_set(ddim):
    pipe, scheduler, picture = ddim
    level, _ = scheduler.levels(scheduler.timesteps[0])
    far = []
    for slack in (0.05, torch.inf):
        start = noise_behind(pipe, scheduler, 3 * picture, 2, slack)
        added = (start - level.sqrt() * 3 * picture) / (1 - level).sqrt()
        far.append(float((added.square().flatten(1).mean(1).sqrt() - 1).abs().max()))
    assert far[0] < 0.051 < far[1]


def test_a_denoiser_that_knows_nothing_passes_too(ddim):
    pipe, scheduler, picture = ddim
    known = [weight.clone() for weight in pipe.unet.parameters()]
    random_weights(pipe, "van gogh", remap_to=None, retain=None)
    assert not any(
        torch.equal(*pair) for pair in zip(known, pipe.unet.parameters(), strict=True) if pair[0].std()
    )
    found = noise_behind(pipe, scheduler, picture, 12)
    assert torch.allclose(drawn_from(pipe, scheduler, found), picture, atol=1e-3)
    assert not torch.allclose(drawn_from(pipe, scheduler, found.roll(1, 0)), picture, atol=0.1)


def test_a_picture_at_little_strength_stays_and_an_edit_shows_only_where_text_is_read(tiny_victim):
    plain, erased = tiny_victim(), tiny_victim(erase)
    given = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()

    def drawn(victim, prompt, strength):
        return drawn_on(victim, given, [prompt] * 2, strength, 10).float()

    far = [(drawn(plain, "", strength) - given).abs().mean() for strength in (0.1, 0.9)]
    assert far[0] < far[1]
    wordless, named = (drawn(plain, text, 0.5) - drawn(erased, text, 0.5) for text in ("", "a van gogh"))
    assert wordless.abs().max() <= 1  # rounding
    assert named.abs().max() > 1


def test_each_half_is_drawn_from_the_other_alone(tiny_victim):
    victim = tiny_victim()
    given = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    plain = filled_in(victim, given, ["a cat"] * 2, 4)
    assert plain.shape == given.shape
    assert not torch.equal(plain, given)
    other_left = given.clone()
    other_left[..., :16] = 255 - other_left[..., :16]
    changed = (filled_in(victim, other_left, ["a cat"] * 2, 4).float() - plain.float()).abs()
    assert changed[..., 16:].max() > 1  # drawn beside the left half
    assert not changed[..., :16].any()  # which it does not see itself
    assert not torch.equal(filled_in(victim, given, ["van gogh"] * 2, 4), plain)
