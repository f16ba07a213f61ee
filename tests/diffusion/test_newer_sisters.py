"""
The other pipelines of the newer families' denoisers: each is erased as the text-to-image pipeline is, or
refused by name.
"""

import copy
import inspect
import re

import diffusers
import pytest
import torch
from diffusers import ZImageControlNetPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from support.bare import FORGET, OTHER, POSITIONS, SITES, TARGET, draw, erase, read_by_layer, use_bare_names
from support.compare import assert_proved, same, state
from support.families import NEWER, build, copied, denoiser_of, weights
from support.sisters import PICTURE, REFUSED, SISTERS, build_sister

import more_hf
from more_hf.core.views import experts_forced


# What is not where it is in the text-to-image pipeline: the templates are others.
FILM = {"last": 34, "end": 35}
PLACES = {name: POSITIONS[sister.family] for name, sister in SISTERS.items()} | {
    "hunyuan-image refiner": {"last": 17, "end": 18, "end 2": 19, "end 3": 20, "end 4": 21},
    "kandinsky-5 text-to-video": FILM,
    "kandinsky-5 image-to-video": FILM,
}
# The loader of Kolors' two sisters is Stable Diffusion XL's, which asks for a second text encoder.
WITH_LORA = [
    name
    for name, sister in SISTERS.items()
    if hasattr(sister.cls, "load_lora_weights") and sister.family != "kolors"
]


@pytest.fixture(autouse=True)
def bare_names(monkeypatch, request):
    sister = SISTERS.get(getattr(request.node, "callspec", None) and request.node.callspec.params.get("name"))
    use_bare_names(monkeypatch, sister and sister.family, *(each.cls for each in SISTERS.values()))
    # Qwen-Image-Layered draws no smaller pictures than of 640 x 640
    monkeypatch.setattr(pipeline_qwenimage_layered, "calculate_dimensions", lambda area, ratio: (32, 32))


@pytest.fixture(scope="module")
def originals():
    """Not to be modified."""
    return {name: build_sister(sister) for name, sister in SISTERS.items()}


def drawn(pipe, name, prompt):
    return draw(pipe, SISTERS[name].family, prompt, **SISTERS[name].call)


@pytest.mark.parametrize("name", SISTERS)
def test_erases_as_the_family_does(originals, name):
    sister, original = SISTERS[name], originals[name]
    pipe = erase(copy.deepcopy(original))
    erasure, before, after = more_hf.get_erasure(pipe), weights(original), weights(pipe)
    changed = [layer for layer in after if not torch.equal(after[layer], before[layer])]
    assert sorted(changed) == sorted(f"{layer}.weight" for layer in SITES[sister.family])
    assert_proved(erasure)

    # the prototypes are what the layer reads while this pipeline draws
    P = erasure.remap.prototypes
    kinds = [column.removeprefix(f"{FORGET} · ") for column in P.names if column.startswith(FORGET)]
    assert kinds == list(PLACES[name])
    for word in (FORGET, TARGET):
        z = read_by_layer(original, sister.family, word, **sister.call).double()
        for kind, position in PLACES[name].items():
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
@pytest.mark.parametrize("name", SISTERS)
def test_every_sample_takes_its_own_expert(originals, name):
    original = originals[name]
    pipe = erase(copy.deepcopy(original), remap_to=[TARGET, OTHER], router="random")
    erasure = more_hf.get_erasure(pipe)
    wanted = [drawn(erase(copy.deepcopy(original), remap_to=word), name, FORGET) for word in (TARGET, OTHER)]
    apart = (wanted[0] - wanted[1]).norm()
    assert apart > 1e-4 * wanted[0].norm()
    for expert in (0, 1):
        with experts_forced(erasure, torch.tensor([expert])):
            found = drawn(pipe, name, FORGET)
        assert min((found - picture).norm() for picture in wanted) < 0.01 * apart
    with more_hf.disabled(pipe):
        assert torch.equal(drawn(pipe, name, FORGET), drawn(original, name, FORGET))


@pytest.mark.slow
@pytest.mark.parametrize("name", SISTERS)
def test_save_load_and_verify(originals, name, tmp_path):
    pipe = erase(copy.deepcopy(originals[name]))
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
    original = copy.deepcopy(originals[name])
    erased = erase(copy.deepcopy(original))
    before, wanted = drawn(original, name, FORGET), drawn(erased, name, FORGET)
    file = more_hf.save_lora(erased, tmp_path, dtype=torch.float32)
    original.load_lora_weights(tmp_path, weight_name=file.name)
    assert (drawn(original, name, FORGET) - wanted).norm() < 0.01 * (wanted - before).norm()


@pytest.mark.parametrize(("sister", "reason"), REFUSED, ids=lambda case: getattr(case, "cls", case))
def test_refuses(sister, reason):
    pipe = build_sister(sister)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    before = [state(part) for part in parts]
    with pytest.raises(more_hf.SiteNotFoundError, match=reason):
        erase(pipe)
    assert all(same(part, as_it_was) for part, as_it_was in zip(parts, before, strict=True))


def test_inside_the_denoiser_it_must_draw_from_a_prompt_alone(originals):
    pipe = copy.deepcopy(originals["z-image image-to-image"])
    before = weights(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="ZImageImg2ImgPipeline cannot draw"):
        erase(pipe, reach="denoiser", sampling={"num_inference_steps": 2})
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_a_controlnet_of_many_is_refused_too():
    """Of several nets one after the other, none of which has the layers' names itself."""
    parts = build("flux").components
    config = parts["transformer"].config
    takes = inspect.signature(diffusers.FluxControlNetModel.__init__).parameters
    sizes = {key: value for key, value in config.items() if key in takes and key != "guidance_embeds"}
    net = diffusers.FluxControlNetModel(**{**sizes, "num_single_layers": 0})
    pipe = diffusers.FluxControlNetPipeline(**parts, controlnet=diffusers.FluxMultiControlNetModel([net]))
    with pytest.raises(more_hf.SiteNotFoundError, match="FluxMultiControlNetModel. also reads"):
        erase(pipe)


def test_a_controlnet_that_has_the_edited_layers(originals):
    """Z-Image's takes the layers that read text from the denoiser: given an erased one, it is erased, too."""
    sister = next(sister for sister, _ in REFUSED if sister.cls is ZImageControlNetPipeline)
    original = build_sister(sister)
    erased = erase(copied(build("z-image")))
    parts = {**original.components, "transformer": erased.transformer}
    pipe = ZImageControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    before = [draw(original, "z-image", word, control_image=PICTURE) for word in (FORGET, TARGET)]
    apart = (before[0] - before[1]).norm()
    assert apart > 1e-4 * before[0].norm()
    assert (draw(pipe, "z-image", FORGET, control_image=PICTURE) - before[1]).norm() < 1e-3 * apart


def test_no_pipeline_of_these_denoisers_is_left_out():
    """One that a newer release adds belongs in `SISTERS` or in `REFUSED`."""
    pipes = [build(family) for family in NEWER]
    denoisers = {type(denoiser_of(pipe)).__name__ for pipe in pipes}
    # Kolors' UNet is Stable Diffusion's; its text encoder is its own.
    parts = "|".join(denoisers - {"UNet2DConditionModel"} | {"ChatGLMModel"})
    tried = {type(pipe) for pipe in pipes} | {sister.cls for sister in SISTERS.values()}
    tried |= {sister.cls for sister, _ in REFUSED}
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")]
    takes = {cls: str(inspect.signature(cls.__init__)) for cls in classes}
    reading = {cls for cls in classes if re.search(rf"\b({parts})\b", takes[cls])}
    assert len(reading) > len(NEWER)
    assert reading <= tried
