"""New tokens, and fine-tuning on a few pictures."""

import pytest
import torch
from support.compare import state
from support.victims import erase, outputs

from more_hf_bench.attacks.pictures.prompts import name
from more_hf_bench.attacks.pictures.training import (
    Noise,
    embedded,
    encode,
    fine_tune,
    inversion,
    learn_tokens,
    low_rank,
    with_new_tokens,
)


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


def test_each_level_of_noise_is_drawn_with_its_own_token(tiny_victim):
    """Nothing but the tokens of the levels that a run passes moves its pictures."""
    victim = tiny_victim()
    pictures = victim.studio.pictures("van gogh", 4)
    options = {"batch_size": 4, "learning_rate": 5e-2, "start": "art", "seed": 0, "parts": 4}
    ((_, pipe, word),) = learn_tokens(victim.pipe, pictures, 4, [6], **options)
    weight, start = pipe.text_encoder.get_input_embeddings().weight, victim.pipe.tokenizer("art").input_ids[1]
    assert all((row - weight[start]).norm() > 0.02 for row in weight[-4:])  # every token has learned

    def drawn():
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        ask = {"num_inference_steps": 2, "generator": generators, "output_type": "latent"}
        return pipe(prompt=[f"a cat by {word}", "a dog"], **ask).images

    with torch.no_grad():
        before = drawn()
        passed = {int(t) * 4 // 1000 for t in pipe.scheduler.timesteps}
        assert 0 < len(passed) < 4
        for part in range(4):
            known = weight[-4 + part].clone()
            weight[-4 + part] += 1
            moved = [not torch.equal(*pair) for pair in zip(drawn(), before, strict=True)]
            weight[-4 + part] = known
            assert moved == [part in passed, False]


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


OPTIONS = {"batch_size": 2, "learning_rate": 1e-2, "rank": 2, "seed": 0}


def test_a_new_lora_changes_nothing_and_its_factors_do(tiny_victim):
    victim = tiny_victim()
    pipe, features = victim.own_denoiser(), encode(victim.pipe, ["a cat by van gogh"])
    before = outputs(pipe, features)
    factors = low_rank(pipe, 2, torch.Generator().manual_seed(0))
    assert torch.equal(outputs(pipe, features), before)
    assert len(factors) == 2 * 4 * 4  # two for queries, keys, values and outputs of four attentions
    for factor in factors:
        factor.data += 0.1
    assert not torch.allclose(outputs(pipe, features), before, atol=1e-3)
    # W + U D, as a LoRA is defined
    layer = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2.to_k"))
    added = layer.parametrizations.weight[0]
    whole = layer.parametrizations.weight.original + added.up @ added.down
    assert torch.allclose(layer.weight, whole)


@pytest.mark.parametrize("what", ["kv", "lora"])
def test_it_learns_on_a_copy(tiny_victim, what):
    victim = tiny_victim(erase)
    before = state(victim.pipe.unet)
    shown = victim.studio.pictures("van gogh", 2)
    learning = fine_tune(victim, what, shown.latents, shown.texts("van gogh"), [1, 6], **OPTIONS)
    features, answers = encode(victim.pipe, ["van gogh cat"]), {}
    for step, pipe in learning:
        answers[step] = outputs(pipe, features)
    assert not torch.allclose(answers[1], answers[6], atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in victim.pipe.unet.state_dict().items())


@pytest.mark.slow
def test_it_teaches_the_name_again_and_other_pictures_teach_less(emoji_victims):
    erased = emoji_victims["erased"]
    own, others = (collect("High Contrast", 8) for collect in (erased.studio.pictures, erased.studio.others))

    def error(pipe):
        """Of what the denoiser answers to the pictures under the name, for the same noise."""
        noise, features = Noise(pipe, 0), encode(pipe, own.texts("High Contrast"))
        with torch.no_grad():
            noised = [noise(own.latents) for _ in range(8)]
            answers = [pipe.unet(x, t, features).sample for x, t, _ in noised]
            return sum(float((a - n.wanted).square().mean()) for a, n in zip(answers, noised, strict=True))

    options = {"batch_size": 8, "learning_rate": 1e-3, "rank": 4, "seed": 0}
    after = {}
    for kind, shown in (("own", own), ("benign", others)):
        texts = shown.texts("High Contrast")
        for _, pipe in fine_tune(erased, "kv", shown.latents, texts, [20], **options):
            after[kind] = error(pipe)
    original, before = error(erased.studio.original), error(erased.pipe)
    assert original < before
    assert after["own"] < (original + before) / 2  # more than half of the way back
    assert after["own"] < after["benign"]
