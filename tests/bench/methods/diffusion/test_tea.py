"""TEA: one step of its training by hand, and that names come to read like their anchors."""

import copy

import pytest
import torch
from support.compare import same, state
from support.methods import CONCEPT, NAMES, run
from support.texts import features

from more_hf.core.errors import IncompatibleBaseError, MoreError
from more_hf_bench.methods.diffusion.tea import new_critic


@pytest.fixture(autouse=True)
def bare_names(monkeypatch):
    monkeypatch.setattr("more_hf_bench.methods.diffusion.tea.everyday_prompts", lambda tokenizer: ())


def test_one_step_by_hand(tiny_sd):
    """One pair of prompts, a step each of critic and encoder, against autograd on the written-out losses."""
    pipe, rate = tiny_sd("1"), 1e-3
    original = copy.deepcopy(pipe.text_encoder)
    ids = [
        pipe.tokenizer(name, padding="max_length", return_tensors="pt").input_ids
        for name in (CONCEPT, NAMES["remap_to"][0])
    ]
    kept = [len(pipe.tokenizer(name).input_ids) for name in (CONCEPT, NAMES["remap_to"][0])]
    run("tea", pipe, retain=None, prompts=1, epochs=1, learning_rate=rate, critic_learning_rate=1e-2)

    student, critic = copy.deepcopy(original).requires_grad_(True), new_critic(original.config.hidden_size, 0)
    sigmoid, rows = torch.sigmoid, [slice(None, count) for count in kept]

    def read(encoder, side):
        return encoder(ids[side])[0][0, rows[side]]

    apart = (
        -sigmoid(critic(read(original, 0))).log().mean()
        - (1 - sigmoid(critic(read(original, 1)))).log().mean()
    )
    step(critic, apart, 1e-2)
    moved = 1 - torch.cosine_similarity(read(student, 1), read(original, 1).detach(), dim=-1).mean()
    step(student, -0.5 * (1 - sigmoid(critic(read(student, 0)))).log().mean() + moved, rate)
    for (name, mine), by_hand in zip(pipe.text_encoder.named_parameters(), student.parameters(), strict=True):
        # Adam's first step is the gradient's sign, which rounding decides where there is no gradient
        clear = by_hand.grad.abs() > 1e-5
        assert clear.any() or name.endswith("k_proj.bias")  # which moves no attention
        assert torch.allclose(mine[clear], by_hand[clear], atol=1e-5), name
    assert not same(pipe.text_encoder, state(original))


def step(module, loss, rate):
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate)
    loss.backward()
    optimizer.step()


def test_the_name_moves_and_its_anchor_stays_with_the_loss_that_holds_it(tiny_sd):
    moved = {}
    for preserving in (0.0, 10.0):
        pipe = tiny_sd("1")
        old, before, unet = pipe.text_encoder, state(pipe.text_encoder), state(pipe.unet)
        texts = [f"a cat by {name}" for name in (CONCEPT, NAMES["remap_to"][0])]
        plain = [features(pipe, text) for text in texts]
        run("tea", pipe, epochs=60, learning_rate=1e-3, prompts=4, preserving=preserving)
        moved[preserving] = [
            float((features(pipe, text) - z).norm()) for text, z in zip(texts, plain, strict=True)
        ]
        assert pipe.text_encoder is not old
        assert same(old, before)
        assert same(pipe.unet, unet)
    (name, anchor), (_, free) = moved[10.0], moved[0.0]
    assert anchor < 0.7 * min(name, free), moved


def test_refusals_change_nothing(tiny_sd):
    pipe = tiny_sd("1")
    encoder = pipe.text_encoder
    with pytest.raises(MoreError, match="needs anchors"):
        run("tea", pipe, remap_to=None, retain=None)
    with pytest.raises(IncompatibleBaseError, match="smaller learning rate"):
        run("tea", pipe, learning_rate=1e30, prompts=2, epochs=3)
    assert pipe.text_encoder is encoder
