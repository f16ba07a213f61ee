"""A modular pipeline of diffusers: its components are edited in place, as those of any other pipeline."""

import pytest
from diffusers import StableDiffusionXLModularPipeline
from support.compare import assert_proved, same, state
from support.families import build

import more_hf


@pytest.fixture
def modular():
    pipe = StableDiffusionXLModularPipeline()
    pipe.update_components(**build("sdxl").components)
    return pipe


def test_its_components_are_edited_and_restored(modular, tmp_path):
    before = state(modular)
    assert more_hf.erase_concept(modular, "van gogh", remap_to="claude monet") is modular
    plain = more_hf.erase_concept(build("sdxl"), "van gogh", remap_to="claude monet")
    assert same(modular, state(plain))
    assert not same(modular, before)
    assert_proved(more_hf.get_erasure(modular))

    call = {"num_inference_steps": 1, "height": 16, "width": 16}
    picture = more_hf.compare(modular, "a house by van gogh", **call)
    assert picture.tobytes() == more_hf.compare(plain, "a house by van gogh", **call).tobytes()
    assert more_hf.verify(more_hf.save(modular, tmp_path / "erased"))

    more_hf.restore(modular)
    assert same(modular, before)


def test_a_model_without_a_plain_pipeline_is_refused_by_name(modular, monkeypatch):
    monkeypatch.setattr(type(modular.blocks), "model_name", "stable-diffusion-99")
    before = state(modular)
    with pytest.raises(more_hf.SiteNotFoundError, match="stable-diffusion-99"):
        more_hf.erase_concept(modular, "van gogh", remap_to="claude monet")
    assert same(modular, before)
