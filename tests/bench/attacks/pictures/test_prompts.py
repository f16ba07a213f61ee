"""Ring-A-Bell and prompt search."""

from functools import partial

import pytest
import torch
from support.victims import erase

from more_hf_bench.attacks.pictures.prompts import (
    SEARCHES,
    breed,
    description,
    name,
    onto_simplex,
    others,
    prompt_search,
    ring_a_bell,
)
from more_hf_bench.attacks.pictures.training import encode


def test_breeding_comes_nearer_to_a_goal(tiny_sd):
    pipe = tiny_sd("1")
    with torch.no_grad():
        goals = encode(pipe, ["a cat by van gogh"])
        distances = {}
        for generations in (0, 20):
            ids = breed(pipe, goals, tokens=4, population=20, generations=generations, seed=0)
            distances[generations] = float((pipe.text_encoder(ids)[0] - goals).square().sum())
    assert ids.shape == goals.shape[:2]
    assert ids[0, 0] == pipe.tokenizer.bos_token_id
    assert (ids[0, 5:] == pipe.tokenizer.eos_token_id).any()
    assert distances[20] < distances[0]


def test_the_search_is_made_once_for_all_methods(tiny_victim):
    victim = tiny_victim()
    settings = {"eta": [], "tokens": 3, "population": 4, "generations": 1}
    list(ring_a_bell(victim, **settings))
    cached = dict(victim.studio._cache)
    list(ring_a_bell(victim, **settings))
    assert victim.studio._cache.keys() == cached.keys()
    assert any(key[0] == "ring-a-bell" for key in cached)


@pytest.mark.slow
def test_the_direction_of_a_name_draws_its_style_in_the_original(emoji_victims):
    settings = {"eta": [0.0, 0.9], "population": 2, "generations": 0}
    found = {r.variant: r.recovered for r in ring_a_bell(emoji_victims["original"], **settings)}
    assert found["embedding, eta 0.9"] > found["embedding, eta 0"]


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


def test_others_pay_for_an_edit_alone(tiny_victim):
    assert [result.recovered for result in others(tiny_victim())] == [0]
    victim = tiny_victim(partial(erase, strength=1.5))
    (paid,) = others(victim, named=3)
    assert paid.recovered > 0
    assert paid.variant == "another artist"
    (before,) = (drawn for key, drawn in victim.studio._cache.items() if key[0] == "others")
    assert len(before) == 3


def test_a_concept_is_asked_for_in_the_words_of_a_file(tiny_victim, tmp_path):
    words = {
        "short": "a cat in dark blue swirls",
        "long": "a cat in thick swirling strokes",
        "name": "van gogh",
    }
    rows = [f"{i},{text},{i},van gogh,{level}" for i, (level, text) in enumerate(words.items())]
    rows.append("3,a cat in cubes,3,pablo picasso,short")
    (tmp_path / "words.csv").write_text("\n".join(["case_number,prompt,evaluation_seed,artist,level", *rows]))
    victim = tiny_victim()
    asked, draw = [], victim.studio.draw
    victim.studio.draw = lambda pipe, texts, seeds: asked.append((texts, seeds)) or draw(pipe, texts, seeds)
    (found,) = description(victim, prompts=str(tmp_path / "words.csv"), levels=["short", "name"])
    assert asked == [([words["short"], words["name"]], [0, 2])]
    assert (found.recovered, found.n) == (100, 2)  # the stub sees what it is asked for
