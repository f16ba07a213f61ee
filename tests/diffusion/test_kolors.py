"""What Kolors alone has: a language model whose padding in front reads the prompt; one layer for all text."""

import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from support.bare import FORGET, LENGTHS, TARGET, use_bare_names
from support.bare import erase as erase_bare
from support.compare import assert_proved, same
from support.families import FORGET as VAN_GOGH
from support.families import LLM_WIDTH, T5_LENGTH, build, copied, erase, shorten, weights

import more_hf
from more_hf.diffusion.encoder import Encoder, fit_prototypes


@pytest.fixture(scope="module")
def original():
    """Not to be modified."""
    return build("kolors")


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch)


def test_the_padding_in_front_tells_the_prompt_and_the_begin_tokens_do_not(original, short):
    encoder = Encoder(original)
    first, second = encoder.encode(["a house by gogh", "a house by monet"])
    (segment,) = encoder.text.segments
    layout = encoder.layout("a house by gogh", segment)
    pads = T5_LENGTH - layout.stop
    assert (layout.start, layout.stop - layout.end) == (2, 0)
    assert torch.equal(first[:pads], first[:1].expand(pads, LLM_WIDTH))
    assert not torch.allclose(first[0], second[0], atol=1e-3)
    # behind two begin tokens the prompts are alike up to the name, their last token
    assert torch.allclose(first[pads:-1], second[pads:-1], atol=1e-5)
    assert not torch.allclose(first[-1], second[-1], atol=1e-3)


KINDS = {"positions": ["last", "after", "padding"], "last+end": ["last", "padding"]}
KINDS |= {"subject+end": ["subject", "padding"], "end": ["padding"]}


@pytest.mark.parametrize(("tokens", "kinds"), KINDS.items())
def test_every_choice_of_positions_has_its_prototypes(original, short, tokens, kinds):
    P = fit_prototypes(Encoder(original), [VAN_GOGH], tokens, sigma_prompts={})["tokens"]
    begins = ["begin token", "begin token 2", "empty prompt, padding"]
    assert list(P.names) == [*begins, *(f"{VAN_GOGH} · {kind}" for kind in kinds)]
    assert_proved(more_hf.get_erasure(erase(copied(original), tokens=tokens)))


def test_padding_counts_towards_the_ordinary_moment(original, short):
    prompts = ["a cat", "a house by monet"]
    encoder = Encoder(original)
    moment = fit_prototypes(encoder, (), "last", sigma_prompts=dict.fromkeys(prompts, 1))["tokens"].moment
    features = encoder.encode(prompts).double()
    counted = []
    for z, words in zip(features, (2, 4), strict=True):
        counted += [*z[: T5_LENGTH - 2 - words], *z[T5_LENGTH - words :]]  # all but the two begin tokens
    z = torch.stack(counted)
    assert torch.allclose(moment.dense, z.T @ z / len(z), rtol=1e-4, atol=1e-6)
    assert moment.count == len(z)


def test_an_ip_adapter_has_to_be_unloaded_first(original, monkeypatch):
    use_bare_names(monkeypatch, LENGTHS)
    pipe = copied(original)
    unet = pipe.unet
    # as `load_ip_adapter` does
    unet.text_encoder_hid_proj = unet.encoder_hid_proj
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, 24, 4)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    before = weights(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="unload_ip_adapter"):
        erase_bare(pipe)
    assert same(unet, before)
    pipe.unload_ip_adapter()
    assert more_hf.get_erasure(erase_bare(pipe)).concepts == [FORGET] != [TARGET]
