"""A family that the package does not know, added as a user would: CogView3-Plus, the real class, tiny."""

import copy

import pytest
import torch
from support.compare import assert_proved
from support.families import T5_LENGTH

import more_hf
from more_hf.diffusion.families import Family, Reader
from more_hf.diffusion.text import Segment, Text


DENOISER, SITE = "CogView3PlusTransformer2DModel", "patch_embed.text_proj"


def find(transformer):
    return {SITE: Reader(transformer.patch_embed.text_proj)}


def find_another(transformer):
    return {"proj_out": Reader(transformer.proj_out)}


def call(transformer, text):
    latent = torch.ones(len(text["tokens"]), transformer.config.in_channels, 4, 4).to(transformer.dtype)
    time, size = latent.new_full((len(latent),), 500.0), latent.new_full((len(latent), 2), 32.0)
    return transformer(latent, text["tokens"].to(latent), time, size, size, size).sample


ENCODED = []


def encode(pipe, prompts):
    ENCODED.extend(prompts)
    embeds, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"tokens": embeds}


ARGUMENTS = ("prompt", "do_classifier_free_guidance", "max_sequence_length")
TEXT = Text(encode=encode, segments=(Segment(clip=False),), arguments=ARGUMENTS, pooled=False)


def draw(pipe):
    ask = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": T5_LENGTH}
    return pipe(
        "a house by van gogh", **ask, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images


def test_an_unknown_family_is_refused_with_the_way_to_add_it(cogview_3):
    with pytest.raises(more_hf.SiteNotFoundError, match="register_family"):
        more_hf.erase_concept(cogview_3, "van gogh", remap_to="claude monet")


def test_registered_it_is_erased_saved_and_restored(cogview_3, tmp_path):
    more_hf.register_family(DENOISER, Family("CogView3-Plus", find, call), TEXT)
    original = copy.deepcopy(cogview_3)
    ENCODED.clear()

    pipe = more_hf.erase_concept(cogview_3, "van gogh", remap_to="claude monet")
    assert any("van gogh" in prompt for prompt in ENCODED)  # by what was registered
    erasure = more_hf.get_erasure(pipe)
    assert list(erasure.sites) == [SITE]
    assert_proved(erasure)
    # the name's last token now gives what the target's gave; the original tells them apart
    P = erasure.remap.prototypes
    forget, target = (P[f"{name} · last"].float() for name in ("van gogh", "claude monet"))
    layer, old = (part.transformer.patch_embed.text_proj for part in (pipe, original))
    assert torch.allclose(layer(forget), old(target), atol=1e-4)
    assert not torch.allclose(old(forget), old(target), atol=1e-2)
    assert not torch.allclose(draw(pipe), draw(original), atol=1e-3)

    loaded = more_hf.load(more_hf.save(pipe, tmp_path / "erased"))
    assert more_hf.verify(tmp_path / "erased").ok
    assert torch.equal(draw(loaded), draw(pipe))
    more_hf.restore(pipe)
    assert torch.equal(layer.weight, old.weight)


def test_a_registration_that_names_other_layers_is_refuted_by_the_run(cogview_3):
    more_hf.register_family(DENOISER, Family("CogView3-Plus", find_another, call), TEXT)
    with pytest.raises(more_hf.SiteNotFoundError):
        more_hf.erase_concept(cogview_3, "van gogh", remap_to="claude monet")
    more_hf.register_family(DENOISER, Family("CogView3-Plus", find, call), TEXT)  # corrected
    pipe = more_hf.erase_concept(cogview_3, "van gogh", remap_to=None)
    assert list(more_hf.get_erasure(pipe).sites) == [SITE]


def test_a_known_family_is_not_replaced():
    with pytest.raises(more_hf.SiteNotFoundError, match="supported already"):
        more_hf.register_family("FluxTransformer2DModel", Family("FLUX", find, call))
