"""`reach="denoiser"`: the remap with what the denoiser's own layers read."""

import copy
import inspect
import json
import re
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from support.compare import state
from support.families import T5_LENGTH, TINY, build, copied, shorten
from support.pipelines import FORGET, TARGETS, build_prompted_sd
from torch import nn

import more_hf
from more_hf.core.facts import is_text
from more_hf.core.record import RECORD
from more_hf.core.request import ConceptRequest
from more_hf.diffusion.activations import (
    ORDINARY,
    PART_NAMES,
    RETAINED,
    _other_prompts,
    _sentences,
    find_listeners,
    record_activations,
    target_of,
)
from more_hf.diffusion.encoder import column
from more_hf.diffusion.erase import erase
from more_hf.diffusion.prompts import TEMPLATES
from more_hf.diffusion.sites import find_denoiser, text_of


STEPS, PICTURES = 6, 3
SAMPLING = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
TARGET = TARGETS[0]
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "down_blocks.0.attentions.0.proj_out"  # 1×1, as in Stable Diffusion 1.x
LORA_A = {  # its first factor
    "peft": f"unet.{CONVOLUTION}.lora_A.weight",
    "kohya": f"lora_unet_{CONVOLUTION.replace('.', '_')}.lora_down.weight",
}


def request_for(*concepts, remap_to=TARGET, **options):
    options = {"pictures": PICTURES, "sampling": SAMPLING, "reach": "denoiser", **options}
    return ConceptRequest.of(concepts or FORGET, remap_to=remap_to, **options)


@pytest.fixture(scope="module")
def original():
    return build_prompted_sd()


@pytest.fixture(scope="module")
def erased(original):
    return erase(copied(original), request_for())


@pytest.fixture(scope="module")
def activations(original):
    """What the layers read, for the request behind `erased`."""
    return recorded(original)


def recorded(pipe, request=None, sent_to=None):
    request = request or request_for()
    return record_activations(pipe, find_denoiser(pipe), request, sent_to or {FORGET: [TARGET]})


def inner_sites(pipe):
    sites = more_hf.get_erasure(pipe).sites
    return {name: site for name, site in sites.items() if not is_text(site.space)}


def draw(pipe, prompt, **options):
    options = {**SAMPLING, "output_type": "latent", "generator": torch.Generator().manual_seed(5), **options}
    return pipe(prompt, **options).images


def positions_before_features(layer, z):
    """What a layer reads as `(batch, positions, d)`; a convolution reads `(batch, d, height, width)`."""
    return z.flatten(2).mT if isinstance(layer, nn.Conv2d) else z


def heard(pipe, prompts, *names):
    """
    What layers read of pictures, each noised to six levels, without and with the prompt:
    `(pictures, 6, 2, positions, d)` by the layer's name.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(7)
    found = {name: [] for name in names}

    def read(name, layer, args):
        found[name].append(positions_before_features(layer, args[0]))

    for i, prompt in enumerate(prompts):
        finished = draw(pipe, prompt, generator=torch.Generator().manual_seed(i))
        features = torch.cat(pipe.encode_prompt(prompt, "cpu", 1, True)[::-1])
        noise = torch.randn(finished.shape, generator=torch.Generator().manual_seed(i))
        layers = {name: pipe.unet.get_submodule(name) for name in names}
        handles = [layer.register_forward_pre_hook(partial(read, name)) for name, layer in layers.items()]
        for t in scheduler.timesteps[1:]:
            pipe.unet(scheduler.add_noise(finished, noise, t[None]).repeat(2, 1, 1, 1), t, features)
        for handle in handles:
            handle.remove()
    shape = (len(prompts), 6)
    return {name: torch.stack(rows).double().unflatten(0, shape) for name, rows in found.items()}


def sentences(name):
    return [TEMPLATES[i].format(name) for i in range(PICTURES)]


@torch.no_grad()
def test_prototypes_and_moments_are_those_that_an_independent_hook_finds(original):
    request, layers = (
        request_for(everyday=("a red house", "two dogs", "the sea at night")),
        (LAYER, CONVOLUTION),
    )
    activations = recorded(original, request)
    named, targeted = (heard(original, sentences(name), *layers) for name in (FORGET, TARGET))
    everyday = heard(original, request.everyday, *layers)
    for layer in layers:
        own, forgotten, target = activations.prototypes[layer], named[layer], targeted[layer]
        for i, part in enumerate(PART_NAMES):
            wanted = {column(FORGET, part): forgotten, target_of(column(FORGET, part)): target}
            for name, features in wanted.items():
                mean = features[:, 2 * i : 2 * i + 2, 1, ::4].mean((0, 1, 2))  # 64 of 256 positions
                assert (own[name] - mean).norm() < 1e-5 * mean.norm()
        z, other = own[column(FORGET, PART_NAMES[0])], own[target_of(column(FORGET, PART_NAMES[0]))]
        assert (z - other).norm() > 1e-3 * z.norm()
        moments = (
            (own.moment, everyday[layer][:, :, :, ::4]),
            (activations.own[layer], forgotten[:, :, 1, ::4]),
        )
        for moment, features in moments:
            rows = features.flatten(0, -2)
            expected = rows.T @ rows / len(rows)
            assert (moment.dense - expected).norm() < 1e-5 * expected.norm()


def test_sentences_that_the_model_knows_come_before_templates():
    everyday = ("a dog by Monet", "a rocket", "the Dog", "a house by Monet", "two rockets")
    request = request_for("dog", remap_to="cat", retain=["Monet"], pictures=3)
    found = _sentences(request, ["dog", "cat", "Monet"], everyday)
    assert found == ["a {} by Monet", "the {}", "a dog by {}"]
    more = replace(request, pictures=5)
    assert _sentences(more, ["dog", "cat", "Monet"], everyday)[3:] == ["a house by {}", TEMPLATES[0]]
    others = _other_prompts(request, everyday)
    assert others[ORDINARY] == ["a rocket", "two rockets"]
    assert others[RETAINED][0] == "a house by Monet"  # no forgotten name
    assert len(others[RETAINED]) == 6


@pytest.mark.parametrize("most", [2, 1])
def test_batches_are_halved_until_they_fit_into_the_memory(original, activations, most):
    """The denoiser's memory holds `most` rows, and guidance makes two of each picture."""
    drawn = []

    def run_out(unet, args):
        drawn.append(len(args[0]))
        if drawn[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = original.unet.register_forward_pre_hook(run_out)
    try:
        if most == 1:  # not even one picture fits
            with pytest.raises(torch.OutOfMemoryError):
                recorded(original)
            return
        found = recorded(original)
    finally:
        handle.remove()
    assert [rows for rows in drawn if rows > most] == [2 * PICTURES]  # and never again
    assert found.spaces == activations.spaces
    for space, own in activations.prototypes.items():
        torch.testing.assert_close(found.prototypes[space].matrix, own.matrix, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.own[space].dense, activations.own[space].dense, rtol=1e-4, atol=1e-5)


def test_layers_that_read_the_same_share_a_space(original, activations):
    spaces = activations.spaces
    attention = LAYER.removesuffix("to_q")
    assert {spaces[attention + name] for name in ("to_q", "to_k", "to_v")} == {LAYER}
    assert spaces[attention + "to_out.0"] == attention + "to_out.0"
    # the listeners are also the timestep's layers
    assert set(spaces) < set(find_listeners(find_denoiser(original)))
    inside = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"}
    inside |= {"ff.net.0.proj", "ff.net.2"}
    inside |= {"proj_in", "proj_out"}  # around the block
    assert {re.split(r"transformer_blocks\.0\.|attentions\.\d\.", name)[-1] for name in spaces} == inside
    # A shortcut is a 1×1 convolution as well, but leads around larger ones.
    shortcuts = [name for name, _ in original.unet.named_modules() if name.endswith("conv_shortcut")]
    assert shortcuts
    assert not spaces.keys() & set(shortcuts)


@torch.no_grad()
def test_every_inner_layer_is_edited_by_the_regression(original, erased, activations):
    modules = dict(original.unet.named_modules())
    for name, site in inner_sites(erased).items():
        space = activations.spaces[name]
        own, forget = activations.prototypes[space], [column(FORGET, part) for part in PART_NAMES]
        steps = torch.stack([own[target_of(part)] - own[part] for part in forget], 1)
        metric = activations.own[space].dense + own.moment.dense
        metric += 1e-3 * metric.trace() / len(metric) * torch.eye(len(metric))
        readers = torch.linalg.solve(metric, torch.stack([own[part] for part in forget], 1)).T / 3
        weight = modules[name].weight.double().flatten(1)
        expected = weight + weight @ steps @ readers
        torch.testing.assert_close(site.read().double(), expected, rtol=1e-5, atol=1e-6)
        assert (site.read() - weight).norm() > 1e-4 * weight.norm()
    erasure = more_hf.get_erasure(erased)
    text = erasure.remaps["tokens"]
    assert text.verify()["forget_to_target"] < 1e-9  # the name's own edit is there, too
    # moments are kept for text alone: inside, they would take gigabytes
    kept = {space for space, remap in erasure.remaps.items() if remap.prototypes.moment is not None}
    assert kept == {"tokens"} < erasure.remaps.keys()
    assert erasure.guarantees["denoiser_ordinary_moved"] > 0


@pytest.mark.slow
@torch.no_grad()
def test_pictures_of_the_concept_look_more_like_the_target_inside(original, erased, activations):
    """Without the name: the layers are shown the same pictures with the target's prompt."""
    site = inner_sites(erased)[LAYER]
    own, weight = activations.prototypes[LAYER], original.unet.get_submodule(LAYER).weight.double()
    forgotten, target = own[column(FORGET, PART_NAMES[2])], own[target_of(column(FORGET, PART_NAMES[2]))]
    before = (weight @ (forgotten - target)).norm()
    assert (site.read().double() @ forgotten - weight @ target).norm() < 0.9 * before


@pytest.mark.slow
def test_what_is_drawn_and_what_is_left(original, erased):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    pipe = copied(original)
    pipe.scheduler.set_timesteps(4)
    timesteps = pipe.scheduler.timesteps.clone()
    recorded(pipe)
    assert torch.equal(torch.rand(1), expected)  # no global random state is touched
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    assert not pipe.unet._forward_pre_hooks
    assert not torch.equal(draw(erased, f"a picture by {FORGET}"), draw(original, f"a picture by {FORGET}"))


def test_restored_bit_for_bit(original):
    pipe = erase(copied(original), request_for())
    assert not state_equal(pipe.unet, original.unet)
    more_hf.restore(pipe)
    assert state_equal(pipe.unet, original.unet)
    assert more_hf.get_erasure(pipe) is None


def state_equal(module, other):
    theirs = state(other)
    return all(torch.equal(value, theirs[name]) for name, value in state(module).items())


@pytest.mark.slow
def test_a_second_concept_is_fitted_from_the_original(original):
    both = erase(copied(original), request_for(FORGET, "pablo picasso"))
    stepwise = erase(copied(original), request_for(FORGET))
    drawn = {"sampling": SAMPLING, "pictures": PICTURES}
    stepwise = more_hf.erase_concept(stepwise, "pablo picasso", remap_to=TARGET, **drawn)
    request = more_hf.get_erasure(stepwise).request
    assert request.reach == "denoiser"  # what was edited stays edited
    for name, value in state(both.unet).items():
        torch.testing.assert_close(state(stepwise.unet)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_without_a_target_it_goes_to_ordinary_pictures(original):
    request = request_for(remap_to=None, everyday=("a red house", "two dogs", "the sea at night"))
    own = recorded(original, request, {FORGET: [None]}).prototypes[LAYER]
    features = heard(original, request.everyday, LAYER)[LAYER]
    for i, part in enumerate(PART_NAMES):
        mean = features[:, 2 * i : 2 * i + 2, 1, ::4].mean((0, 1, 2))
        assert (own[target_of(column(FORGET, part))] - mean).norm() < 1e-5 * mean.norm()
    pipe = erase(copied(original), request)
    assert more_hf.get_erasure(pipe).guarantees["denoiser_way_left"] < 1


@pytest.mark.slow
def test_saved_loaded_and_verified(erased, tmp_path):
    folder = more_hf.save(erased, tmp_path / "erased")
    assert more_hf.verify(folder)
    loaded = more_hf.load(folder)
    assert state_equal(loaded.unet, erased.unet)
    erasure = more_hf.get_erasure(loaded)
    assert erasure.request == more_hf.get_erasure(erased).request
    assert erasure.sites.keys() == more_hf.get_erasure(erased).sites.keys()
    with pytest.raises(more_hf.AlreadyErasedError):
        more_hf.erase_concept(loaded, "cat", remap_to="dog")
    assert f"{len(inner_sites(erased))} of these inside the denoiser" in str(erasure)


@pytest.mark.slow
def test_verify_sees_an_inner_layer_that_was_put_back(original, erased, tmp_path):
    folder = more_hf.save(erased, tmp_path / "erased")
    pipe = more_hf.load(folder)
    pipe.unet.get_submodule(LAYER).weight.data.copy_(original.unet.get_submodule(LAYER).weight)
    pipe.unet.save_pretrained(folder / "unet")
    checks = {check.name: check.passed for check in more_hf.verify(folder).checks}
    assert not checks["the edited layers are those that were saved"]


@pytest.mark.slow
def test_factors_are_saved_on_request(erased, tmp_path):
    loaded = more_hf.load(more_hf.save(erased, tmp_path / "erased", include_delta=True))
    before, after = more_hf.get_erasure(erased).remaps, more_hf.get_erasure(loaded).remaps
    assert before.keys() == after.keys()
    assert torch.equal(after[LAYER].dual, before[LAYER].dual)
    assert after[LAYER].solver == "regression"


@pytest.mark.slow
def test_a_record_that_names_no_inner_layer_is_refused(erased, tmp_path):
    folder = more_hf.save(erased, tmp_path / "erased")
    record = json.loads((folder / RECORD).read_text())
    forged = {**record, "facts": {**record["facts"], "spaces": {}}}
    (folder / RECORD).write_text(json.dumps(forged))
    with pytest.raises(more_hf.IncompatibleBaseError, match="no layer inside the denoiser"):
        more_hf.verify(folder)
    forged["facts"]["spaces"] = {"nowhere": "nowhere"}
    (folder / RECORD).write_text(json.dumps(forged))
    assert "not a linear layer" in more_hf.verify(folder).failures
    with pytest.raises(more_hf.SiteNotFoundError, match="no layer `nowhere`"):
        more_hf.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_as_a_lora_it_is_the_same_edit(original, erased, tmp_path, format):
    path = tmp_path / "lora.safetensors"
    file = more_hf.save_lora(erased, path, format=format, dtype=torch.float32)
    assert len(load_file(file)[LORA_A[format]].shape) == 4  # as the convolution's weight
    pipe = copied(original)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    prompt = f"a house by {FORGET}"
    expected, plain = draw(erased, prompt), draw(original, prompt)
    torch.testing.assert_close(draw(pipe, prompt), expected, rtol=1e-3, atol=1e-3)
    assert (plain - expected).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", [LAYER, CONVOLUTION])
def test_the_proof_finds_an_inner_layer_that_reads_another_weight(original, name):
    pipe = copied(original)
    layer, old = pipe.unet.get_submodule(name), original.unet.get_submodule(name)
    layer.forward = old.forward
    before = {name: value.clone() for name, value in state(pipe.unet).items()}
    with pytest.raises(more_hf.SiteNotFoundError, match="proof by run failed"):
        erase(pipe, request_for())
    assert all(torch.equal(value, before[name]) for name, value in state(pipe.unet).items())
    assert more_hf.get_erasure(pipe) is None


@pytest.mark.slow
def test_a_router_acts_on_the_prompt_and_the_mean_is_inside(original):
    everyday = ("a red house", "two dogs", "the sea at night")
    request = request_for(remap_to=TARGETS, router="hash", everyday=everyday)
    pipe = erase(copied(original), request)
    erasure = more_hf.get_erasure(pipe)
    assert erasure.remap.num_experts == len(TARGETS)
    own = recorded(original, request, {FORGET: TARGETS}).prototypes[LAYER]
    each = [recorded(original, request, {FORGET: [name]}).prototypes[LAYER] for name in TARGETS]
    forgotten = column(FORGET, PART_NAMES[-1])
    mean = torch.stack([one[target_of(forgotten)] for one in each]).mean(0)
    torch.testing.assert_close(own[target_of(forgotten)], mean, rtol=1e-5, atol=1e-6)
    with more_hf.disabled(pipe):
        torch.testing.assert_close(draw(pipe, "a cat"), draw(original, "a cat"))


@pytest.mark.slow
def test_under_a_lora_the_base_is_edited(original, tmp_path):
    file = more_hf.save_lora(erase(copied(original), request_for("cat")), tmp_path / "cat.safetensors")
    pipe = copied(original)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    erase(pipe, request_for())
    assert set(inner_sites(pipe)) == set(inner_sites(erase(copied(original), request_for())))
    pipe.unload_lora_weights()
    assert more_hf.restore(pipe) is pipe
    assert state_equal(pipe.unet, original.unet)


@pytest.mark.slow
@torch.no_grad()
def test_under_sequential_offload(original, erased):
    pipe = copied(original)
    cpu_offload(pipe.unet, torch.device("cpu"))
    held = {name: pipe.unet.get_submodule(name)._hf_hook.weights_map for name in (LAYER, CONVOLUTION)}
    erase(pipe, request_for())
    for name, weights in held.items():
        assert pipe.unet.get_submodule(name).weight.is_meta
        before, wanted = (each.unet.get_submodule(name).weight for each in (original, erased))
        torch.testing.assert_close(weights["weight"], wanted, rtol=1e-4, atol=1e-6)
        assert (weights["weight"] - before).norm() > 1e-4 * before.norm()
    more_hf.restore(pipe)
    for name, weights in held.items():
        assert torch.equal(weights["weight"], original.unet.get_submodule(name).weight)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(original, dtype):
    pipe = copied(original)
    pipe.unet.to(dtype)
    pipe.text_encoder = copy.deepcopy(original.text_encoder).to(dtype)
    erase(pipe, request_for())
    assert inner_sites(pipe)[LAYER].read().dtype is dtype
    proof = more_hf.get_erasure(pipe).proof
    assert 0 < proof["layer_error"] < 4
    assert proof["layer_changed"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart", "z-image", "qwen-image", "wan", "sana"])
def test_other_families(family):
    pipe = build(family)
    before = {name: value.clone() for name, value in state(find_denoiser(pipe).module).items()}
    sampling = {**TINY[family].call, "num_inference_steps": 4, "height": 32, "width": 32}
    everyday = ("a red house", "two dogs", "the sea at night")
    erase(pipe, request_for(sampling=sampling, everyday=everyday))
    erasure = more_hf.get_erasure(pipe)
    assert inner_sites(pipe)
    assert erasure.proof["layer_error"] < 4
    assert erasure.guarantees["denoiser_way_left"] < 1
    more_hf.restore(pipe)
    assert all(torch.equal(v, before[k]) for k, v in state(find_denoiser(pipe).module).items())


# How each family is asked for both halves of guidance. They are a batch, the half without the prompt first
# (Z-Image's last), or two calls.
GUIDED = {
    "kandinsky-5": {"guidance_scale": 3.0},
    "hunyuan-image": {},
    "chroma": {"guidance_scale": 3.0, "negative_prompt": "cat"},
    "qwen-image": {"true_cfg_scale": 3.0, "negative_prompt": "cat"},
    **dict.fromkeys(("z-image", "klein", "wan", "sana"), {"guidance_scale": 3.0}),
    **dict.fromkeys(("lumina-2", "cogview-4", "auraflow"), {"guidance_scale": 3.0}),
}
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in list(GUIDED)[1:]]


@pytest.mark.parametrize("family", ["kandinsky-5", *SLOW])
def test_prototypes_are_of_the_half_with_the_prompt(family, monkeypatch):
    """A hook beside the recorder tells the halves apart by the text that the denoiser is given."""
    shorten(monkeypatch)
    pipe = build(family)
    pipe.resolutions = [(32, 32)]  # of Kandinsky 5, which draws no others
    pipe.tokenizer_max_length = T5_LENGTH  # of HunyuanImage, which pads to a thousand tokens
    if family == "klein":
        pipe.register_to_config(is_distilled=False)
    denoiser, calls = find_denoiser(pipe), []
    takes = list(inspect.signature(denoiser.module.forward).parameters)
    argument = "cap_feats" if family == "z-image" else "encoder_hidden_states"

    def given(module, args, kwargs):
        calls.append(({**dict(zip(takes, args, strict=False)), **kwargs}[argument], defaultdict(list)))

    def read(name, module, args):
        if args[0].ndim > 2:
            z = positions_before_features(module, args[0]).flatten(1, -2).double()
            calls[-1][1][name].append(z[:, :: -(-z.shape[1] // 64)].mean(1))

    denoiser.module.register_forward_pre_hook(given, with_kwargs=True)
    for name, layer in find_listeners(denoiser).items():
        layer.register_forward_pre_hook(partial(read, name))
    sampling = {"height": 32, "width": 32, **TINY[family].call, **GUIDED[family], "num_inference_steps": 3}
    templates, everyday = ("{}", "a house by {}"), ("a house", "two dogs")
    request = request_for(sampling=sampling, pictures=2, templates=templates, everyday=everyday)
    name, own = list(recorded(pipe, request).prototypes.items())[-1]

    # Three batches are drawn, of the name, its target and ordinary prompts: in three steps, and shown in
    # seven, the first of them noise alone.
    halves = len(calls) // 30
    assert len(calls) == 30 * halves
    shown = calls[4 * halves : 10 * halves]
    prompts = [template.format(FORGET) for template in templates]
    with_prompt = text_of(pipe, denoiser).encode(pipe, prompts)["tokens"]
    for i, part in enumerate(PART_NAMES):
        found = {True: [], False: []}
        for texts, means in shown[2 * i * halves : 2 * (i + 1) * halves]:
            for row, text in enumerate(texts):
                prompted = any(starts_alike(text, features) for features in with_prompt)
                found[prompted] += [mean[row] for mean in means[name]]
        mean, other = (torch.stack(found[prompted]).mean(0) for prompted in (True, False))
        assert (own[column(FORGET, part)] - mean).norm() < 1e-5 * mean.norm()
        assert (own[column(FORGET, part)] - other).norm() > 1e-3 * mean.norm()


def starts_alike(text, features):
    """Whether these are the same `(tokens, d)`, as far as both go: padding may be cut off."""
    tokens = min(len(text), len(features))
    return torch.allclose(text[:tokens], features[:tokens], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reach": "everything"}, "Unknown reach"),
        ({"sampling": {"prompt": "a cat"}}, "cannot set 'prompt'"),
        ({"sampling": {"height": [1]}}, "numbers and texts by name"),
        ({"sampling": [1]}, "must be a mapping"),
        ({"pictures": 0}, "`pictures`"),
    ],
)
def test_wrong_requests_are_refused(options, message):
    with pytest.raises(more_hf.PrototypeError, match=message):
        request_for(**options)


def test_the_request_survives_json():
    request = request_for()
    assert ConceptRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    old = {name: value for name, value in request.to_dict().items() if name not in ("reach", "sampling")}
    assert ConceptRequest.from_dict(old).reach == "name"


def test_the_reach_of_each_concept():
    request = request_for(FORGET, "picasso", reach={FORGET: "denoiser"})
    assert request.inside == [FORGET]
    assert ConceptRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert request.without([FORGET]).inside == []
    later = request_for("picasso", "goya", reach={"picasso": "denoiser"})
    assert request.joined(later).inside == [FORGET, "picasso"]
    assert later.joined(request_for("miro", reach="name")).inside == ["picasso"]
    assert request.joined(request_for("miro")).inside == [FORGET, "picasso", "miro"]
    with pytest.raises(more_hf.PrototypeError, match="'goya', which is not forgotten"):
        request_for(FORGET, reach={"goya": "denoiser"})


@pytest.mark.slow
def test_inside_the_denoiser_one_concept_alone(original):
    """The layers inside are those of the one; giving it back gives them back, bit for bit."""
    both = erase(copied(original), request_for(FORGET, "pablo picasso", reach={FORGET: "denoiser"}))
    erasure, inside = more_hf.get_erasure(both), inner_sites(both)
    assert inside
    for name in inside:
        names = erasure.remap_of(name).prototypes.names
        assert all(FORGET in forgotten for forgotten in names)
    rows = dict(erasure.rows())
    assert f"for {FORGET} alone" in rows["reach"]
    more_hf.restore(both, FORGET)
    after, before = state(both.unet), state(original.unet)
    assert all(torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]) for name in inside)
    assert not all(torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]) for name in erasure.sites)
    assert "reach" not in dict(more_hf.get_erasure(both).rows())
