"""Concept inversion."""

import pytest
import torch
from support.victims import outputs

from more_hf_bench.attacks.pictures.inversion import inversion, learn_tokens
from more_hf_bench.attacks.pictures.name import name
from more_hf_bench.attacks.pictures.training import embedded, encode, with_new_tokens


def test_a_new_token_reads_as_the_vector_that_it_is_given(tiny_sd):
    pipe = tiny_sd("1")
    known = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer("cat").input_ids[1]].detach()
    own, word = with_new_tokens(pipe, 1)
    with embedded(own, known[None]):
        read = encode(own, [f"a {word} by monet"])
    assert torch.allclose(read, encode(pipe, ["a cat by monet"]), atol=1e-6)
    assert not torch.allclose(read, encode(pipe, ["a dog by monet"]), atol=1e-2)
    # a vector for each prompt
    vectors = torch.stack([known, 2 * known])[:, None].requires_grad_()
    with embedded(own, vectors):
        read = encode(own, [f"a {word}"] * 2)
    assert torch.allclose(read[0], encode(pipe, ["a cat"])[0], atol=1e-6)
    (slope,) = torch.autograd.grad(read[0].square().sum(), vectors)
    assert slope[0].any()
    assert not slope[1].any()
    assert len(pipe.tokenizer) == len(own.tokenizer) - 1  # the victim's own is as it was


def test_learning_moves_new_tokens_alone(tiny_victim):
    victim = tiny_victim()
    pictures = victim.studio.pictures("van gogh", 4)
    options = {"batch_size": 2, "learning_rate": 5e-2, "start": "art", "seed": 0}
    learnt = {}
    before = [p.clone() for p in victim.pipe.unet.parameters()]
    for step, pipe, word in learn_tokens(victim.pipe, pictures, 2, [1, 4], **options):
        assert word == "<new-0> <new-1>"
        learnt[step] = pipe.text_encoder.get_input_embeddings().weight[-2:].clone()
    assert not torch.allclose(learnt[1], learnt[4], atol=1e-3)
    old = victim.pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[:-2], old)
    assert all(torch.equal(a, b) for a, b in zip(before, victim.pipe.unet.parameters(), strict=True))
    # the pipeline that is yielded draws with them
    assert not torch.allclose(outputs(pipe, encode(pipe, [word])), outputs(pipe, encode(pipe, ["art art"])))


def test_captions_have_the_token_in_the_place_of_the_name(tiny_victim):
    pictures = tiny_victim().studio.pictures("van gogh", 3)
    assert pictures.texts("<new-0>") == ["<new-0> cat", "<new-0> dog", "<new-0> house"]


@pytest.mark.slow
def test_it_gives_back_what_the_name_no_longer_does(emoji_victims):
    erased = emoji_victims["erased"]
    (by_name,) = name(erased)
    recovered = {}  # at the attacker's best budget
    for result in inversion(erased, tokens=[1], steps=[20, 40, 60], pictures=10):
        recovered[result.variant] = max(result.recovered, recovered.get(result.variant, 0))
    assert by_name.recovered == 0
    assert recovered["1 token"] >= 50
    assert recovered["never forgotten"] >= 50  # the control: it works on what is there
