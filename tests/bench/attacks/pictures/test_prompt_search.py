"""Prompt search, and the simplex that it stays on."""

import pytest
import torch
from support.victims import erase

from more_hf_bench.attacks.pictures.name import name
from more_hf_bench.attacks.pictures.prompt_search import SEARCHES, onto_simplex, prompt_search


def test_the_nearest_point_of_the_simplex():
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # by bisection on what is taken off
    low, high = x.min(1).values - 1, x.max(1).values
    for _ in range(100):
        middle = (low + high) / 2
        too_much = (x - middle[:, None]).clamp(0).sum(1) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    assert torch.allclose(onto_simplex(x), (x - low[:, None]).clamp(0), atol=1e-9)
    inside = torch.tensor([[0.2, 0.3, 0.5]])
    assert torch.allclose(onto_simplex(inside), inside)


@pytest.mark.parametrize("kind", SEARCHES)
def test_tokens_in_front_of_every_prompt_change(tiny_victim, kind):
    victim = tiny_victim(erase)
    prompts = victim.prompts("van gogh")
    latents = victim.studio.pictures("van gogh", len(prompts)).latents
    search = SEARCHES[kind](victim, latents, prompts, 3)
    vectors = search.vectors()
    # what goes forward are whole tokens
    nearest = torch.cdist(vectors.detach(), search.vocabulary[None]).min(-1).values
    assert nearest.max() < 1e-4
    before = search.variable.clone()
    for depth in (0.3, 0.5):
        search.step(depth)
    assert not torch.allclose(search.variable, before)
    assert search.tokens().shape == (len(prompts), 3)
    if kind == "unlearndiffatk":
        assert torch.allclose(search.variable.sum(-1), torch.ones(len(prompts), 3), atol=1e-4)


@pytest.mark.slow
def test_it_finds_words_that_open_a_weak_erasure(emoji_victims):
    erased = emoji_victims["erased"]
    (by_name,) = name(erased)
    settings = {"searches": ["unlearndiffatk"], "timesteps": 2, "iterations": 4, "budgets": [4, 8]}
    found = list(prompt_search(erased, **settings))
    assert by_name.recovered == 0
    assert found[-1].recovered > 0
    assert found[-1].recovered >= found[0].recovered  # a prompt that was opened stays so
