"""`reach="gates"`: gates in the denoiser's feed-forward layers, from its own pictures to plain diffusers."""

import json

import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from support.compare import changed, state
from support.families import TINY, build, copied
from support.pipelines import FORGET, TARGETS, build_prompted_sd

import more_hf
from more_hf.core.facts import READERS
from more_hf.core.report import explained
from more_hf.core.request import ConceptRequest
from more_hf.diffusion import gates
from more_hf.diffusion.activations import ORDINARY, draw_pictures, picture_prompts
from more_hf.diffusion.erase import erase
from more_hf.diffusion.prompts import everyday_prompts
from more_hf.diffusion.sites import find_denoiser
from more_hf.saving.delta import read_rewrites


SAMPLING = {"num_inference_steps": 2, "guidance_scale": 3.0}
OPTIONS = {"reach": "gates", "pictures": 4, "sampling": SAMPLING}
TARGET, OTHER = TARGETS[0], "pablo picasso"


def request_for(*concepts, **options):
    return ConceptRequest.of(concepts or FORGET, **{"remap_to": TARGET, **OPTIONS, **options})


@pytest.fixture(scope="module")
def original():
    return build_prompted_sd()


@pytest.fixture(scope="module")
def erased(original):
    return erase(copied(original), request_for())


def same(module, other):
    theirs = state(other)
    return all(torch.equal(value, theirs[name]) for name, value in state(module).items())


def assert_alike(pipe, other):
    """The same, although one was fitted on what an edited pipeline's layers show of the original."""
    theirs = state(other.unet)
    for name, value in state(pipe.unet).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


def draw(pipe):
    generator = torch.Generator().manual_seed(5)
    return pipe(f"a picture by {FORGET}", output_type="latent", generator=generator, **SAMPLING).images


def readers_in(pipe):
    return [name for name, site in more_hf.get_erasure(pipe).sites.items() if site.space == READERS]


@pytest.mark.slow
def test_the_inner_blocks_get_gates_and_nothing_else_changes(original, erased):
    edited = {
        name
        for name, value in state(erased.unet).items()
        if not torch.equal(value, state(original.unet)[name])
    }
    gated = {name for name in edited if ".ff." in name}
    assert {name.split(".ff.")[1] for name in gated} == {
        "net.0.proj.weight",
        "net.0.proj.bias",
        "net.2.weight",
    }
    blocks = {name.split(".ff.")[0] for name in gated}
    assert blocks == {name.removesuffix(".ff.net.0.proj") for name in readers_in(erased)}
    widest = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert widest in gates.find_blocks(find_denoiser(erased)).keys() - blocks
    assert all("attn2.to_" in name for name in edited - gated)
    guarantees = more_hf.get_erasure(erased).guarantees
    assert guarantees["gates_move_own"] > 0
    assert guarantees["gates_move_others"] > 0
    rows = dict(more_hf.get_erasure(erased).rows())
    assert f"gates in {len(blocks)} feed-forward layers" in rows["reach"]
    assert "in plain" in rows["gates"]
    assert all(len(explained([name]).splitlines()) == 3 for name in rows)
    assert not torch.equal(draw(erased), draw(original))


@pytest.mark.slow
def test_the_original_is_shown_and_restored_bit_for_bit(original, erased):
    with more_hf.disabled(erased):
        assert torch.allclose(draw(erased), draw(original), atol=1e-5)
    pipe = erase(copied(original), request_for())
    assert same(pipe.unet, erased.unet)  # the seed decides
    assert not same(erase(copied(original), request_for(seed=1)).unet, erased.unet)
    more_hf.restore(pipe)
    assert same(pipe.unet, original.unet)


@pytest.mark.slow
@torch.no_grad()
def test_what_was_tried_is_what_is_written(original, monkeypatch):
    """
    With units that write nothing to take the place of, the weights move predictions as the trial of all gates
    did, and others' pictures as is told.
    """
    monkeypatch.setattr(gates, "QUANTILE", 0.5)  # so that each concept's gates move others' pictures
    pipe, sent_to = copied(original), {FORGET: [TARGET], OTHER: [TARGET]}
    request, softer = (request_for(*sent_to, softness=softness) for softness in (1.0, 4.0))
    for block in gates.find_blocks(find_denoiser(pipe)).values():
        block.ff.net[2].weight[:, :4] = 0
    denoiser = find_denoiser(pipe)
    prompts = picture_prompts(request, sent_to, everyday_prompts(pipe.tokenizer))
    drawn = {name: [] for name in prompts}
    for one in draw_pictures(pipe, request, sent_to, prompts):
        drawn[one.name].append(one)
    pictures, (ordinary,) = [one for name in sent_to for one in drawn[name]], drawn[ORDINARY]
    held_out = gates._of(ordinary, gates.TRIAL)
    found, softer = (gates.find_gates(pipe, denoiser, one, sent_to) for one in (request, softer))
    for block, own in softer.gates.items():  # softness divides what they write
        for gate, harder in zip(own, found.gates[block], strict=True):
            torch.testing.assert_close(4 * gate.step, harder.step)
    assert softer.moved["gates_move_own"] < found.moved["gates_move_own"]
    theater = gates._Theater(denoiser, gates.find_blocks(denoiser))
    before, before_others = (theater.predictions(shown, {}) for shown in (pictures, held_out))
    tried = theater.predictions(pictures, found.gates)
    alone = theater.predictions(held_out, {block: own[:1] for block, own in found.gates.items()})
    sites = gates.find_activation_sites(denoiser, found.spaces)
    for name, rewrite in found.rewrites({name: site.read() for name, site in sites.items()}).items():
        sites[name].write(rewrite.merged(sites[name].read()))
    after, after_others = (theater.predictions(shown, {}) for shown in (pictures, held_out))
    assert len(before) == 2 * gates.LEVELS * sum(len(one.seeds) for one in pictures)
    assert (tried - before).norm() > 1e-3 * before.norm()
    assert (after - tried).norm() < 0.05 * (tried - before).norm()
    told = found.moved["gates_move_others"]
    assert gates._moved(before_others, after_others) == pytest.approx(told, rel=0.05)
    assert gates._moved(before_others, alone) != pytest.approx(told, rel=0.05)


@pytest.mark.slow
def test_saved_loaded_verified_and_opened_by_plain_diffusers(original, erased, tmp_path):
    folder = more_hf.save(erased, tmp_path / "erased", include_delta=True)
    assert more_hf.verify(folder, run=True)
    plain = StableDiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    assert same(plain.unet, erased.unet)
    assert torch.equal(draw(plain), draw(erased))
    loaded = more_hf.get_erasure(more_hf.load(folder))
    assert loaded.request == more_hf.get_erasure(erased).request
    # the factors give back the original
    for name, rewrite in read_rewrites(folder).items():
        site, before = loaded.sites[name], more_hf.get_erasure(erased).originals[name]
        back = site.read().double() - rewrite.lora_B @ rewrite.lora_A
        torch.testing.assert_close(back.float(), before, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(site.read(), before, rtol=1e-4, atol=1e-4)
        assert name in loaded.rewrites
    # a bias that was put back is found
    layer = readers_in(erased)[0]
    plain.unet.get_submodule(layer).bias.data.copy_(original.unet.get_submodule(layer).bias)
    plain.unet.save_pretrained(folder / "unet")
    checks = {check.name: check.passed for check in more_hf.verify(folder).checks}
    assert not checks["the edited layers are those that were saved"]


@pytest.mark.slow
def test_concepts_come_and_go_together(original, erased):
    both = more_hf.erase_concept(erase(copied(original), request_for()), OTHER, remap_to=TARGET, **OPTIONS)
    assert_alike(both, erase(copied(original), request_for(FORGET, OTHER)))
    more_hf.restore(both, OTHER)
    assert_alike(both, erased)
    named = more_hf.erase_concept(copied(original), FORGET, remap_to=TARGET)
    assert not any(".ff." in name for name in more_hf.get_erasure(named).sites)
    more_hf.erase_concept(named, FORGET, remap_to=TARGET, **OPTIONS)
    assert_alike(named, erased)
    before = state(named)
    with pytest.raises(more_hf.AlreadyErasedError, match="Restore it first"):
        more_hf.erase_concept(named, OTHER, remap_to=TARGET, **{**OPTIONS, "reach": "denoiser"})
    assert not changed(named, before)


@pytest.mark.slow
def test_the_proof_finds_a_bias_that_is_not_read(original, erased):
    pipe, name = copied(original), readers_in(erased)[0]
    layer, bias = pipe.unet.get_submodule(name), original.unet.get_submodule(name).bias
    layer.forward = lambda z: torch.nn.functional.linear(z, layer.weight, bias)
    before = state(pipe.unet)
    with pytest.raises(more_hf.SiteNotFoundError, match="proof by run failed"):
        erase(pipe, request_for())
    assert all(torch.equal(value, before[name]) for name, value in state(pipe.unet).items())


@pytest.mark.slow
def test_under_sequential_offload(original, erased):
    pipe, name = copied(original), readers_in(erased)[0]
    cpu_offload(pipe.unet, torch.device("cpu"))
    held = pipe.unet.get_submodule(name)._hf_hook.weights_map
    erase(pipe, request_for())
    wanted, before = (one.unet.get_submodule(name).bias for one in (erased, original))
    torch.testing.assert_close(held["bias"], wanted, rtol=1e-3, atol=1e-4)
    assert not torch.equal(held["bias"], before)
    more_hf.restore(pipe)
    assert torch.equal(held["bias"], before)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "pixart"])
def test_other_families(family):
    pipe = build(family)
    before = state(pipe)
    sampling = {**TINY[family].call, **SAMPLING, "height": 32, "width": 32}
    everyday = ("a red house", "two dogs", "the sea at night", "a cup of tea")
    with pytest.raises(more_hf.PrototypeError, match="at least 4 ordinary prompts"):
        erase(pipe, request_for(sampling=sampling, everyday=everyday[1:]))
    assert not changed(pipe, before)
    erase(pipe, request_for(sampling=sampling, everyday=everyday))
    biases = {name for name in changed(pipe, before) if name.endswith("ff.net.0.proj.bias")}
    assert biases
    more_hf.restore(pipe)
    assert not changed(pipe, before)


@pytest.mark.slow
def test_what_no_gates_can_be_written_into_is_refused_unchanged(original):
    pipe = build("sd3")
    before = state(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="no transformer blocks.*reach='denoiser'"):
        more_hf.erase_concept(pipe, FORGET, remap_to=TARGET, **OPTIONS)
    assert not changed(pipe, before)
    # a quantized layer
    pipe = copied(original)
    layer = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj")
    layer.__class__ = type("Linear4bit", (torch.nn.Linear,), {})
    with pytest.raises(more_hf.SiteNotFoundError, match="not a plain nn.Linear"):
        erase(pipe, request_for())
    assert same(pipe.unet, original.unet)


@pytest.mark.slow
def test_no_lora_and_no_folder_without_a_denoiser(original, erased, tmp_path):
    with pytest.raises(more_hf.ExportError, match="changes biases"):
        more_hf.save_lora(erased, tmp_path)
    with pytest.raises(more_hf.ExportError, match="changes biases"):
        more_hf.erase_to_lora(original, tmp_path, FORGET, remap_to=TARGET, reach="gates")
    with pytest.raises(more_hf.PrototypeError, match="draws pictures"):
        more_hf.erase_to_folder(tmp_path, tmp_path / "to", FORGET, remap_to=TARGET, reach="gates")
    with pytest.raises(more_hf.PrototypeError, match="draws pictures"):
        more_hf.erase_file(tmp_path / "a", tmp_path / "b", FORGET, remap_to=TARGET, reach="gates")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reach": {FORGET: "gates", OTHER: "denoiser"}}, "by one way alone"),
        ({"pictures": 3}, "at least 4 pictures"),
        ({"softness": 0}, "must be above 0"),
    ],
)
def test_wrong_requests_are_refused(options, message):
    with pytest.raises(more_hf.PrototypeError, match=message):
        request_for(FORGET, OTHER, **options)


def test_the_later_way_decides_and_what_was_edited_stays_edited():
    gated, inner, named = (request_for(reach=reach) for reach in ("gates", "denoiser", "name"))
    assert ConceptRequest.from_dict(json.loads(json.dumps(gated.to_dict()))) == gated
    assert named.joined(gated).reach == gated.joined(named).reach == "gates"
    assert inner.joined(gated).reach == "gates"
    assert gated.joined(inner).reach == "denoiser"
    one = request_for(FORGET, OTHER, reach={OTHER: "gates"})
    assert (one.inside, one.gated) == ([OTHER], True)
    assert one.joined(request_for(FORGET, reach={FORGET: "denoiser"})).reach == {
        OTHER: "denoiser",
        FORGET: "denoiser",
    }
    assert one.without([OTHER]).gated is False
