"""Σ is that of the ordinary prompts whether it was computed now, in part, or an hour ago."""

import pytest
import torch
from support.families import T5_LENGTH, build, set_length

import more_hf
from more_hf.core.request import ConceptRequest
from more_hf.diffusion import kept, ordinary
from more_hf.diffusion.encoder import Encoder, fit_prototypes
from more_hf.diffusion.plan import prepare


PROMPTS = ("a cat", "a dog and a tree", "a house by van gogh", "a car", "a small tree in the rain")
TIGHT = {"rtol": 1e-6, "atol": 1e-8}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that went through the text encoder for a moment."""
    seen = []
    compute = ordinary.compute_moments

    def counting(encoder, prompts, **options):
        seen.extend(prompts)
        return compute(encoder, prompts, **options)

    monkeypatch.setattr(ordinary, "compute_moments", counting)
    return seen


def sigma(pipe, concepts="van gogh", **options):
    request = ConceptRequest.of(concepts, remap_to="claude monet", everyday=PROMPTS, **options)
    return prepare(Encoder.of(pipe, request), request)["tokens"].prototypes


def directly(pipe, prompts):
    return fit_prototypes(Encoder(pipe), (), "last", sigma_prompts=dict.fromkeys(prompts, 1))["tokens"]


def test_the_moment_is_that_of_prompts_without_the_name(tiny_sd, cache):
    pipe = tiny_sd()
    others = [prompt for prompt in PROMPTS if "van gogh" not in prompt]
    found, expected = sigma(pipe), directly(pipe, others)
    assert found.moment_count == expected.moment_count
    assert torch.allclose(found.moment.dense, expected.moment.dense, **TIGHT)
    assert not torch.allclose(found.moment.dense, directly(pipe, PROMPTS).moment.dense, rtol=1e-3)


def test_retained_names_are_in_it(tiny_sd, cache):
    pipe = tiny_sd()
    templates = ("{} style", "a picture by {} there")  # the padding of the second one stands for both
    found = sigma(pipe, retain="andy warhol", templates=templates)
    others = [prompt for prompt in PROMPTS if "van gogh" not in prompt]
    warhol = {"andy warhol style": 0, "a picture by andy warhol there": 2}
    behind = dict.fromkeys(others, 1) | warhol
    expected = fit_prototypes(Encoder(pipe), (), "last", sigma_prompts=behind)["tokens"]
    assert found.moment_count == expected.moment_count
    assert torch.allclose(found.moment.dense, expected.moment.dense, **TIGHT)


def test_the_second_time_only_what_is_left_out_is_encoded(tiny_sd, cache, encoded):
    pipe = tiny_sd()
    first = sigma(pipe)
    assert encoded == [*PROMPTS, "a house by van gogh"]
    encoded.clear()
    again = sigma(tiny_sd())  # another object with the same weights
    assert encoded == ["a house by van gogh"]
    assert torch.allclose(again.moment.dense, first.moment.dense, **TIGHT)
    assert len(list(cache.iterdir())) == 1


def test_where_most_are_left_out_the_rest_is_encoded(tiny_sd, cache, encoded):
    sigma(tiny_sd(), ["cat", "dog", "house"])
    assert encoded == ["a car", "a small tree in the rain"]


@pytest.mark.parametrize("change", ["weights", "prompts", "tokenizer"])
def test_another_encoder_and_other_prompts_are_not_mistaken(tiny_sd, cache, encoded, change):
    pipe = tiny_sd()
    before = ordinary.everyday_moments(Encoder(pipe), PROMPTS)
    encoded.clear()
    prompts = PROMPTS[:-1] if change == "prompts" else PROMPTS
    if change == "weights":
        with torch.no_grad():
            for parameter in pipe.text_encoder.parameters():
                parameter *= 1.1
    if change == "tokenizer":
        pipe.tokenizer.add_tokens("tree")
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    after = ordinary.everyday_moments(Encoder(pipe), prompts)
    assert encoded == list(prompts)
    assert not torch.equal(before["tokens"].matrix, after["tokens"].matrix)


def test_prompts_with_another_padding_are_not_mistaken(cache, monkeypatch):
    """FLUX reads the padding, and how much of it there is, is the pipeline's."""
    pipe, counts = build("flux"), []
    for length in (T5_LENGTH, T5_LENGTH // 2, T5_LENGTH):
        set_length(monkeypatch, type(pipe), length)
        counts.append(ordinary.everyday_moments(Encoder(pipe), PROMPTS)["tokens"].count)
    assert counts == [len(PROMPTS) * length for length in (T5_LENGTH, T5_LENGTH // 2, T5_LENGTH)]
    assert len(list(cache.iterdir())) == 2  # the third is the first one again


def test_a_lora_on_the_text_encoder_is_not_kept(tiny_sd, cache):
    pipe = tiny_sd()
    pipe.text_encoder.peft_config = {"default": object()}
    assert sigma(pipe).moment_count
    assert not cache.exists()


def test_a_damaged_file_is_written_again(tiny_sd, cache, encoded):
    first = sigma(tiny_sd())
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    encoded.clear()
    assert torch.allclose(sigma(tiny_sd()).moment.dense, first.moment.dense, **TIGHT)
    assert set(PROMPTS) <= set(encoded)
    assert file.stat().st_size > 100


def test_no_place_for_it(tiny_sd, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(kept, "CACHE", tmp_path / "file" / "cache")
    pipe = more_hf.erase_concept(tiny_sd(), "van gogh", remap_to="claude monet")
    assert more_hf.get_erasure(pipe)
    assert "again next time" in caplog.text
