"""Ring-A-Bell."""

import pytest
import torch

from more_hf_bench.attacks.pictures.ring_a_bell import ring_a_bell, search
from more_hf_bench.attacks.pictures.training import encode


def test_breeding_comes_nearer_to_a_goal(tiny_sd):
    pipe = tiny_sd("1")
    with torch.no_grad():
        goals = encode(pipe, ["a cat by van gogh"])
        distances = {}
        for generations in (0, 20):
            ids = search(pipe, goals, tokens=4, population=20, generations=generations, seed=0)
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
