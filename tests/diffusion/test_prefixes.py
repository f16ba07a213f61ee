"""What prompts have in common is encoded once, and is what the text encoder makes of each prompt alone."""

import pytest
import torch

from more_hf.core.request import ConceptRequest
from more_hf.diffusion import encoder as encoding
from more_hf.diffusion.encoder import Encoder, column, fit_prototypes
from more_hf.diffusion.plan import solve


PROMPTS = ["van gogh", "van gogh style", "a cat", "", "a cat on a table", "van gogh", "a dog by andy warhol"]


@pytest.fixture
def positions(monkeypatch):
    """How many positions went through a text encoder, by pipeline."""

    def count(pipe):
        seen = []
        pipe.text_encoder.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[:2]))
        return seen

    return count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_wanted_positions_are_those_of_the_encoder(tiny_sd, attention):
    pipe = tiny_sd()
    pipe.text_encoder.set_attn_implementation(attention)
    encoder = Encoder(pipe)
    wanted = [encoder.length, 4, 3, encoder.length, 6, 2, 5]
    found, expected = encoder.features(PROMPTS, wanted)["tokens"], encoder.encode(PROMPTS)
    for z, full, count in zip(found, expected, wanted, strict=True):
        assert torch.allclose(z[:count], full[:count], rtol=1e-4, atol=1e-5)
        assert not z[count:].any()
    assert not torch.allclose(expected[1, :4], expected[4, :4], atol=1e-2)


def test_a_mask_of_its_own_is_heeded(tiny_sd):
    pipe = tiny_sd()
    pipe.text_encoder.config.use_attention_mask = True
    encoder = Encoder(pipe)
    masked = encoder.features(PROMPTS, [3] * len(PROMPTS))["tokens"]
    assert torch.equal(masked, encoder.encode(PROMPTS))


def test_it_is_less_work(tiny_sd, positions):
    pipe = tiny_sd()
    seen, length = positions(pipe), Encoder(pipe).length
    ordinary = {f"a {thing} {place}": 0 for thing in ("cat", "dog") for place in ("", "on a table", "there")}
    fit_prototypes(Encoder(pipe), ["van gogh"], "last+end", sigma_prompts=ordinary)
    trees = sum(rows for rows, _ in seen)
    assert {columns for _, columns in seen} == {length}
    assert trees < 8  # of 21 prompts: one for the empty prompt with its padding


def test_the_padding_of_one_prompt_stands_for_all_of_a_name(tiny_sd):
    pipe = tiny_sd()
    templates = ("{}", "{} style", "a {}")
    encoder = Encoder(pipe, templates)
    behind = encoder.prompts_of(["van gogh"])
    assert behind == {"van gogh": 0, "van gogh style": 3, "a van gogh": 0}
    found = fit_prototypes(encoder, ["van gogh"], "positions", sigma_prompts=behind)["tokens"]

    bare, style, article = encoder.encode(list(behind)).double()
    padding = style[5:]  # behind begin token, three words and end token
    rows = torch.cat([bare[1:4], style[1:5], article[1:5], padding, padding, padding])
    assert found.moment_count == len(rows)
    assert torch.allclose(found.moment.dense, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[column("van gogh", "padding")], padding.mean(0), rtol=1e-4, atol=1e-5)


def test_where_there_is_little_padding_all_of_it_counts(emoji_sd):
    encoder = Encoder(emoji_sd)
    assert set(encoder.prompts_of(["Blobmoji"]).values()) == {1}
    assert len(encoder.name_spans("Blobmoji", "padding")) == len(encoder.templates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forget", "target", "retain", "sentence"),
    [
        ("High Contrast", "Twemoji", ("Fluent", "Noto", "Streamline"), "a {} in the style of {}"),
        ("crown", "emoji", ("fish", "snake", "ghost"), "{1} {0}"),
    ],
)
def test_it_does_as_well_as_the_padding_of_all(emoji_sd, monkeypatch, forget, target, retain, sentence):
    """What is left on the way to the target, and how far the retained move, over whole prompts."""
    things, artists = ("cat face", "pear", "rocket", "house"), ("Monotone", "EmojiOne", "Blobmoji", "Noto")
    style = forget == "High Contrast"

    def encoded(name):
        pairs = [(thing, name) for thing in things] if style else [(name, artist) for artist in artists]
        return encoder.encode([sentence.format(*pair) for pair in pairs]).double()[:, 1:]

    encoder = Encoder(emoji_sd)
    before, goal, others = encoded(forget), encoded(target), torch.cat([encoded(name) for name in retain])
    measured = []
    for longest in (encoding.LONG, 0):
        monkeypatch.setattr(encoding, "LONG", longest)
        request = ConceptRequest.of(forget, remap_to=target, retain=retain)
        remap = solve(Encoder(emoji_sd), request).remaps["tokens"]
        left = (remap.apply(before) - goal).norm() / (before - goal).norm()
        measured.append((float(left), float((remap.apply(others) - others).norm() / others.norm())))
    (left, moved), (left_of_one, moved_of_one) = measured
    assert measured[0] != measured[1]
    assert left_of_one < 1.1 * left < 0.7
    assert moved_of_one < 1.2 * moved < 0.2
