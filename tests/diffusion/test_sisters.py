"""Every other pipeline of the families' denoisers is erased as theirs is, or refused by name."""

import inspect
import re

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from support.bare import FORGET, LENGTHS, OTHER, TARGET, draw, erase, read_by_layers, use_bare_names
from support.compare import assert_proved, changed, same, state
from support.families import MATRIX, TINY, Built, build, copied, denoiser_of, weights, with_parts
from support.sisters import PICTURE, REFUSED, SISTERS, WITH_CONTROLNET, build_sister

import more_hf
from more_hf.core.views import experts_forced


# What is not where it is in the text-to-image pipeline: the templates are others.
FILM = {"last": 34, "end": 35}
PLACES = {
    "hunyuan-image refiner": {"last": 17, "end": 18, "end 2": 19, "end 3": 20, "end 4": 21},
    "kandinsky-5 text-to-video": FILM,
    "kandinsky-5 image-to-video": FILM,
}
FIRST = ("sd-1", "sdxl", "sd3", "flux", "pixart")  # the newer families read the prompt in ways of their own
NEWER = [name for name, sister in SISTERS.items() if sister.family not in FIRST]
SOME = NEWER[::4]  # of what is the family's, which `test_families.py` has for every one
SLOW = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in SISTERS]
# The loader of Kolors' two sisters is Stable Diffusion XL's, which asks for a second text encoder.
LOADERS = [name for name in NEWER if SISTERS[name].family != "kolors"]
WITH_LORA = [name for name in LOADERS if hasattr(SISTERS[name].cls, "load_lora_weights")][::4]


@pytest.fixture(scope="module", autouse=True)
def bare_names():
    lengths = {sister.cls: TINY[sister.family].bare_length for sister in SISTERS.values()}
    with pytest.MonkeyPatch.context() as patch:
        use_bare_names(patch, LENGTHS | lengths)
        # Qwen-Image-Layered draws no smaller pictures than of 640 x 640
        patch.setattr(pipeline_qwenimage_layered, "calculate_dimensions", lambda area, ratio: (32, 32))
        yield


@pytest.fixture(scope="module")
def originals():
    """Not to be modified."""
    return Built(lambda name: build_sister(SISTERS[name]))


def drawn(pipe, name, prompt):
    return draw(pipe, SISTERS[name].family, prompt, **SISTERS[name].call)


@pytest.mark.parametrize("name", SLOW)
def test_erases_as_the_family_does(originals, name):
    sister, original, tiny = SISTERS[name], originals[name], TINY[SISTERS[name].family]
    pipe = erase(copied(original))
    erasure = more_hf.get_erasure(pipe)
    assert changed(denoiser_of(pipe), weights(original)) == {f"{layer}.weight" for layer in tiny.sites}
    assert_proved(erasure)

    # the prototypes are what the layer reads while this pipeline draws
    P = erasure.remap.prototypes
    kinds = [column.removeprefix(f"{FORGET} · ") for column in P.names if column.startswith(FORGET)]
    places = PLACES.get(name, tiny.positions["tokens"])
    assert kinds == list(places)
    for word in (FORGET, TARGET):
        z = read_by_layers(original, sister.family, word, **sister.call)[next(iter(tiny.sites))]
        for kind, position in places.items():
            assert torch.allclose(P[f"{word} · {kind}"], z[position], rtol=1e-4, atol=1e-5)

    # and the name as it is typed gives what its target gives
    pictures = {word: drawn(original, name, word) for word in (FORGET, TARGET)}
    apart = (pictures[FORGET] - pictures[TARGET]).norm()
    assert apart > 1e-4 * pictures[FORGET].norm()
    for word in (FORGET, TARGET):
        assert (drawn(pipe, name, word) - pictures[TARGET]).norm() < 1e-3 * apart
    more_hf.restore(pipe)
    assert torch.equal(drawn(pipe, name, FORGET), pictures[FORGET])


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_every_sample_takes_its_own_expert(originals, name):
    original = originals[name]
    pipe = erase(copied(original), remap_to=[TARGET, OTHER], router="random")
    erasure = more_hf.get_erasure(pipe)
    wanted = [drawn(erase(copied(original), remap_to=word), name, FORGET) for word in (TARGET, OTHER)]
    apart = (wanted[0] - wanted[1]).norm()
    assert apart > 1e-4 * wanted[0].norm()
    for expert in (0, 1):
        with experts_forced(erasure, torch.tensor([expert])):
            found = drawn(pipe, name, FORGET)
        assert min((found - picture).norm() for picture in wanted) < 0.01 * apart
    with more_hf.disabled(pipe):
        assert torch.equal(drawn(pipe, name, FORGET), drawn(original, name, FORGET))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_save_load_and_verify(originals, name, tmp_path):
    pipe = erase(copied(originals[name]))
    folder = more_hf.save(pipe, tmp_path / "erased")
    assert more_hf.verify(folder), more_hf.verify(folder)
    loaded = more_hf.load(folder)
    assert type(loaded) is type(pipe)
    loaded.set_progress_bar_config(disable=True)
    wanted = drawn(pipe, name, FORGET)
    apart = (wanted - drawn(originals[name], name, FORGET)).norm()
    assert (drawn(loaded, name, FORGET) - wanted).norm() < 1e-3 * apart


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_LORA)
def test_lora_on_the_original_is_the_erased_pipeline(originals, name, tmp_path):
    original = copied(originals[name])
    erased = erase(copied(original))
    before, wanted = drawn(original, name, FORGET), drawn(erased, name, FORGET)
    file = more_hf.save_lora(erased, tmp_path, dtype=torch.float32)
    original.load_lora_weights(tmp_path, weight_name=file.name)
    assert (drawn(original, name, FORGET) - wanted).norm() < 0.01 * (wanted - before).norm()


@pytest.mark.parametrize(("sister", "words"), REFUSED, ids=lambda case: getattr(case, "pipeline", ""))
def test_refuses(sister, words):
    pipe = build_sister(sister)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    before = [state(part) for part in parts]
    with pytest.raises(more_hf.SiteNotFoundError) as error:
        erase(pipe)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert all(same(part, as_it_was) for part, as_it_was in zip(parts, before, strict=True))


def test_inside_the_denoiser_it_must_draw_from_a_prompt_alone(originals):
    original = originals["z-image image-to-image"]
    pipe = copied(original)
    with pytest.raises(more_hf.SiteNotFoundError, match="ZImageImg2ImgPipeline cannot draw"):
        erase(pipe, reach="denoiser", sampling={"num_inference_steps": 2})
    assert same(denoiser_of(pipe), weights(original))


def test_a_controlnet_of_many_is_refused_too():
    """Of several nets one after the other, none of which has the layers' names itself."""
    (sister,) = [sister for sister in WITH_CONTROLNET if sister.family == "flux"]
    pipe = build_sister(sister)
    pipe.register_modules(controlnet=diffusers.FluxMultiControlNetModel([pipe.controlnet]))
    with pytest.raises(more_hf.SiteNotFoundError, match="FluxMultiControlNetModel. also reads"):
        erase(pipe)


def test_a_controlnet_that_has_the_edited_layers():
    """Z-Image's takes the layers that read text from the denoiser: given an erased one, it is erased, too."""
    (sister,) = [sister for sister in WITH_CONTROLNET if sister.pipeline == "ZImageControlNetPipeline"]
    original = build_sister(sister)
    erased = erase(copied(build("z-image")))
    pipe = with_parts(sister.cls, {**original.components, "transformer": erased.transformer})
    before = [draw(original, "z-image", word, control_image=PICTURE) for word in (FORGET, TARGET)]
    apart = (before[0] - before[1]).norm()
    assert apart > 1e-4 * before[0].norm()
    assert (draw(pipe, "z-image", FORGET, control_image=PICTURE) - before[1]).norm() < 1e-3 * apart


def test_no_pipeline_of_the_newer_denoisers_is_left_out():
    """One that a newer release adds belongs in `SISTERS` or in `REFUSED`."""
    newer = [TINY[family] for family in MATRIX if family not in (*FIRST, "sd-2")]
    # Kolors' UNet is Stable Diffusion's; its text encoder is its own.
    parts = "|".join({tiny.denoiser for tiny in newer} - {"UNet2DConditionModel"} | {"ChatGLMModel"})
    tried = {tiny.pipeline for tiny in newer} | {sister.pipeline for sister in SISTERS.values()}
    tried |= {sister.pipeline for sister, _ in REFUSED}
    classes = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    takes = {name: str(inspect.signature(getattr(diffusers, name).__init__)) for name in classes}
    reading = {name for name in classes if re.search(rf"\b({parts})\b", takes[name])}
    assert len(reading) > len(newer)
    assert reading <= tried
