"""Relearning."""

import pytest
import torch
from support.compare import state
from support.victims import erase, outputs

from more_hf_bench.attacks.pictures.relearning import fine_tune, low_rank
from more_hf_bench.attacks.pictures.training import Noise, encode


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
