"""Every method on every newer family: it works there, or it refuses before anything is changed."""

from functools import partial

import pytest
import torch
from support.compare import changed, state
from support.families import Built, build, copied, images
from support.pipelines import ONE_ATTENTION

import more_hf
from more_hf.core.errors import SiteNotFoundError
from more_hf_bench.methods.registry import DIFFUSION


pytestmark = pytest.mark.usefixtures("short_prompts")

CONCEPT, TARGET = "van gogh", "claude monet"
OF_STABLE_DIFFUSION = {"more-denoiser-rece"}
EVERY_FAMILY = {"original", *(name for name in DIFFUSION if name.startswith("more"))} - OF_STABLE_DIFFUSION
KEYS_AND_VALUES = {"uce", "uce-paper", "rece", "cure", "speed", "oce"}
VALUES_ONLY = {"speed", "oce"}
TRAINED = {"iterations": 1, "sampling_steps": 2}
SETTINGS = {
    # the embedded pipeline's descriptions are longer than what these tiny encoders read
    "more-described": {"candidates": ["Vincent"]},
    "esd": TRAINED,
    "esd-repo": TRAINED,
    "ca": {**TRAINED, "images": 1, "prompts": ["a cat"]},
    "more-denoiser-rece": {"sampling_steps": 2},
    "midsteer": {"pictures": 2, "sampling_steps": 2},
    "tea": {"prompts": 2},
    "oce": {"expand": None},  # six prompts would span all four outputs of the smallest tiny layers
}


@pytest.fixture(scope="module")
def originals():
    """Not to be modified."""
    return Built(build)


@pytest.fixture(autouse=True)
def few_ordinary_prompts(monkeypatch):
    monkeypatch.setattr(
        "more_hf_bench.methods.diffusion.texts.everyday_prompts",
        lambda tokenizer: ("a dog and a tree", "a house", "a car"),
    )


def run(name, pipe):
    remap_to = None if DIFFUSION[name].targets == "none" else [TARGET]
    return DIFFUSION[name].load()(
        pipe, CONCEPT, remap_to=remap_to, retain=["pablo picasso"], **SETTINGS.get(name, {})
    )


TEXT_LAYERS = {
    "sdxl": ("add_embedding.linear_1.weight", "attn2.to_k.weight", "attn2.to_v.weight"),
    "sd3": ("context_embedder.weight", "text_embedder.linear_1.weight"),
    "flux": ("context_embedder.weight", "text_embedder.linear_1.weight"),
    "pixart": ("caption_projection.linear_1.weight",),
}


def layers_of(name, family, names):
    """What a method edits: ours every layer that reads text, the published ones keys and values."""
    if name == "original":
        return set()
    ends = TEXT_LAYERS[family]
    if name in KEYS_AND_VALUES:
        ends = ends[-1:] if name in VALUES_ONLY else ends[1:]
    return {key for key in names if key.startswith(("unet.", "transformer.")) and key.endswith(ends)}


INSIDE = {"more-denoiser": 1.0, "more-denoiser-soft": 4.0, "more-denoiser-hard": 0.25}
INSIDE |= {"more-gates": 1.0, "more-gates-soft": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "softness"), INSIDE.items())
def test_inside_the_denoiser(name, softness, tiny_sd, monkeypatch):
    """Which families it works on is in `tests/diffusion/test_activations.py`: it draws many pictures."""
    fewer = partial(more_hf.erase_concept, pictures=4)  # not 32
    monkeypatch.setattr("more_hf_bench.methods.diffusion.ours.erase_concept", fewer)
    within, reach = (".ff.net.2.weight", "gates") if "gates" in name else ("attn1.to_k.weight", "denoiser")
    pipe = tiny_sd(**ONE_ATTENTION)
    before = state(pipe)
    assert DIFFUSION[name].targets == "one"
    DIFFUSION[name].load()(pipe, CONCEPT, remap_to=[TARGET], retain=None, sampling_steps=2, guidance=3.0)
    request = more_hf.get_erasure(pipe).request
    assert request.reach == reach
    assert request.softness == softness
    assert request.sampling == {"num_inference_steps": 2, "guidance_scale": 3.0}
    edited = changed(pipe, before)
    assert {key for key in edited if key.endswith("attn2.to_k.weight")}
    assert {key for key in edited if key.endswith(within)}


@pytest.mark.slow
@pytest.mark.parametrize("family", TEXT_LAYERS)
@pytest.mark.parametrize("name", [name for name in DIFFUSION if name not in INSIDE])
def test_works_or_refuses_before_anything_is_changed(name, family, originals, tiny_sd):
    pipe = copied(originals[family])
    before = state(pipe)
    if name in EVERY_FAMILY or (name in KEYS_AND_VALUES and family == "sdxl"):
        found = run(name, pipe)
        assert changed(found, before) == layers_of(name, family, before)
        assert torch.isfinite(images(found, family, f"a cat by {CONCEPT}", num_inference_steps=1)).all()
        return
    closed = "keys and values of CLIP features.*Stable Diffusion 1.x, 2.x or XL"
    kind = closed if name in KEYS_AND_VALUES else "runs inside StableDiff"
    with pytest.raises(SiteNotFoundError, match=rf"(?s){kind}.*`erase_concept`") as error:
        run(name, pipe)
    assert type(pipe).__name__ in str(error.value)
    assert not changed(pipe, before)
    if family == "sdxl":  # what is refused here, as it is asked for, works where it belongs
        assert run(name, tiny_sd()) is not None


def feature(pipe, name):
    """The feature of a name's last token in SDXL, by calling the text encoders themselves."""
    parts = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(name, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            parts.append(encoder(ids, output_hidden_states=True).hidden_states[-2])
    return torch.cat(parts, -1)[0, len(pipe.tokenizer(name).input_ids) - 2]


@pytest.mark.parametrize("name", ["uce", "uce-paper", "rece", "speed"])
def test_sends_the_concept_to_its_target_in_sdxl(name, originals):
    pipe = copied(originals["sdxl"])
    before = state(pipe)
    c, g = feature(pipe, CONCEPT), feature(pipe, TARGET)
    edited = changed(run(name, pipe), before)
    after = state(pipe)
    for key in edited:
        assert (after[key] @ c - before[key] @ g).norm() < 0.6 * (before[key] @ (c - g)).norm()


def test_cure_takes_the_concept_out_of_sdxl(originals):
    pipe = copied(originals["sdxl"])
    before, c = state(pipe), feature(pipe, CONCEPT)
    edited = changed(run("cure", pipe), before)
    after = state(pipe)
    assert all((after[key] @ c).norm() < 0.9 * (before[key] @ c).norm() for key in edited)


def test_oce_rotates_what_sdxl_makes_of_the_concept(originals):
    pipe = copied(originals["sdxl"])
    before, c = state(pipe), feature(pipe, CONCEPT)
    edited = changed(run("oce", pipe), before)
    after = state(pipe)
    for key in edited:
        assert torch.allclose(after[key].T @ after[key], before[key].T @ before[key], rtol=1e-4, atol=1e-5)
        assert (after[key] @ c - before[key] @ c).norm() > 0.1 * (before[key] @ c).norm()
