"""Wan 2.2: two transformers that take turns, erased, saved and restored as one."""

import copy
import json
import math
import threading

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file, save_file
from support.bare import FORGET, LENGTHS, OTHER, TARGET, draw, erase, use_bare_names
from support.compare import assert_proved, same, state
from support.families import T5_LENGTH, TINY, build, second_transformer
from support.records import list_files_again
from support.sisters import FILM, PICTURE, Sister, build_sister
from torch import nn
from torch.nn.functional import linear

import more_hf
from more_hf.cli.main import main
from more_hf.core.record import Record
from more_hf.core.registry import find_erasure, locked
from more_hf.core.views import experts_forced
from more_hf.diffusion.sites import find_denoiser


PARTS = ["transformer", "transformer_2"]
LAYER = "condition_embedder.text_embedder.linear_1"
STEPS = {"num_inference_steps": 4}  # of which the first is the first transformer's


@pytest.fixture(autouse=True)
def bare_names(monkeypatch):
    use_bare_names(monkeypatch, LENGTHS | {WanImageToVideoPipeline: T5_LENGTH})


@pytest.fixture(scope="module")
def original():
    """Not to be modified."""
    return build("wan-2.2")


@pytest.fixture
def pipe(original):
    return copy.deepcopy(original)


def states(pipe):
    return {part: state(getattr(pipe, part)) for part in PARTS}


def layer_of(pipe, part):
    return getattr(pipe, part).get_submodule(LAYER)


def alone(pipe, part="transformer"):
    """A pipeline with one of the two, which it shares."""
    return WanPipeline(**{**pipe.components, "transformer": getattr(pipe, part), "transformer_2": None})


def left(pipe, original):
    """How far the forgotten name is from its target's film, as a share of the way."""
    before = {name: draw(original, "wan", name, **STEPS) for name in (FORGET, TARGET)}
    return float(
        (draw(pipe, "wan", FORGET, **STEPS) - before[TARGET]).norm()
        / (before[FORGET] - before[TARGET]).norm()
    )


def test_one_call_edits_both(original, pipe):
    erasure = more_hf.get_erasure(erase(pipe))
    assert list(erasure.sites) == [f"{part}.{LAYER}" for part in PARTS]
    before, after = states(original), states(pipe)
    for part in PARTS:
        changed = [name for name, value in after[part].items() if not torch.equal(value, before[part][name])]
        assert changed == [f"{LAYER}.weight"]
        # one remap, fitted once, in either weight
        W = before[part][f"{LAYER}.weight"].double()
        expected = (W + W @ erasure.remap.shift() @ erasure.remap.D_F).float()
        assert torch.equal(after[part][f"{LAYER}.weight"], expected)
    assert list(erasure.remaps) == ["tokens"]
    assert_proved(erasure)

    assert left(original, original) == 1
    assert left(pipe, original) < 1e-3
    wanted = draw(original, "wan", TARGET, **STEPS)
    assert (draw(pipe, "wan", TARGET, **STEPS) - wanted).norm() < 1e-3 * wanted.norm()
    with more_hf.disabled(pipe):
        assert left(pipe, original) == 1
    more_hf.restore(pipe)
    assert all(same(getattr(pipe, part), before[part]) for part in PARTS)
    assert more_hf.get_erasure(pipe) is None


@pytest.mark.parametrize("part", PARTS)
def test_with_one_of_them_edited_the_name_is_not_gone(original, pipe, part):
    erase(pipe)
    layer_of(pipe, part).load_state_dict(layer_of(original, part).state_dict())
    assert left(pipe, original) > 0.01


@pytest.mark.parametrize("router", [None, "random"])
@pytest.mark.parametrize("part", PARTS)
def test_the_proof_sees_that_one_was_missed(pipe, part, router):
    """Also when what this one answers is small beside the other's answer."""
    with torch.no_grad():
        getattr(pipe, part).proj_out.weight.mul_(1e-4)
    layer, before = layer_of(pipe, part), states(pipe)
    weight = layer.weight.detach().clone()
    layer.forward = lambda x: linear(x, weight, layer.bias)
    with pytest.raises(more_hf.SiteNotFoundError, match="proof by run failed"):
        erase(pipe, router=router)
    assert all(same(getattr(pipe, name), before[name]) for name in PARTS)
    assert more_hf.get_erasure(pipe) is None
    for name in PARTS:
        assert not any(module._forward_pre_hooks for module in getattr(pipe, name).modules())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype):
    pipe.to(dtype)
    for part in PARTS:
        model = getattr(pipe, part)
        for name, module in model.named_modules():  # as `from_pretrained` does
            if name.split(".")[-1] in model._keep_in_fp32_modules:
                module.float()
    before = states(pipe)
    erasure = more_hf.get_erasure(erase(pipe))
    assert len(erasure.originals) == 2
    for part in PARTS:
        W, found = before[part][f"{LAYER}.weight"], layer_of(pipe, part).weight
        exact = W.double() + W.double() @ erasure.remap.shift() @ erasure.remap.D_F
        assert found.dtype == dtype
        assert torch.equal(found, exact.to(dtype))
        assert not torch.equal(found, W)
    more_hf.restore(pipe)
    assert all(same(getattr(pipe, part), before[part]) for part in PARTS)


def enabled(pipe, how):
    """Both, one after the other, as the pipeline's own call does."""
    for part in PARTS:
        how(getattr(pipe, part), torch.device("cpu"))


@pytest.mark.parametrize("router", [None, pytest.param("random", marks=pytest.mark.slow)])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [cpu_offload_with_hook, cpu_offload], ids=["model", "sequential"])
def test_offloaded(original, pipe, offload, when, router):
    if when == "before":
        enabled(pipe, offload)
    erase(pipe, router=router)
    if when == "after":
        enabled(pipe, offload)
    assert left(pipe, original) < 1e-3
    with more_hf.disabled(pipe):
        assert left(pipe, original) == 1
    more_hf.restore(pipe)
    assert left(pipe, original) == 1


def test_the_weights_that_sequential_offload_holds_are_the_edited_ones(original, pipe):
    enabled(pipe, cpu_offload)
    held = [layer_of(pipe, part)._hf_hook.weights_map for part in PARTS]
    erasure = more_hf.get_erasure(erase(pipe))
    for part, weights in zip(PARTS, held, strict=True):
        W = layer_of(original, part).weight.double()
        exact = (W + W @ erasure.remap.shift() @ erasure.remap.D_F).float()
        assert torch.equal(weights["weight"], exact)


def test_a_later_call_fits_both_again(original, pipe):
    erase(pipe)
    more_hf.erase_concept(pipe, OTHER, remap_to=TARGET, solver="pinv")
    assert more_hf.get_erasure(pipe).concepts == [FORGET, OTHER]
    assert left(pipe, original) < 1e-3
    more_hf.restore(pipe, FORGET)
    fresh = more_hf.erase_concept(copy.deepcopy(original), OTHER, remap_to=TARGET, solver="pinv")
    for part in PARTS:
        assert torch.allclose(layer_of(pipe, part).weight, layer_of(fresh, part).weight, atol=1e-6)


def test_one_stream_of_experts_serves_both(original, pipe):
    erasure = more_hf.get_erasure(erase(pipe, remap_to=[TARGET, OTHER], router="random"))
    first, second = erasure.hooks
    assert first.router is second.router
    prompts = ["a house by gogh", "gogh"]
    wanted = []
    for expert in (0, 1):
        moved = copy.deepcopy(original)
        for part in PARTS:
            weight = layer_of(moved, part).weight.data.double()
            weight += weight @ erasure.remap.shift(expert) @ erasure.remap.D_F
            layer_of(moved, part).weight.data = weight.float()
        wanted.append(draw(moved, "wan", prompts, **STEPS))
    with experts_forced(erasure, torch.tensor([0, 1])):
        found = draw(pipe, "wan", prompts, **STEPS)
    for i in (0, 1):
        apart = (wanted[0][i] - wanted[1][i]).norm()
        assert apart > 1e-4 * wanted[0][i].norm()
        assert (found[i] - wanted[i][i]).norm() < 0.01 * apart
    with more_hf.routing(pipe, seeds=[1, 2]):
        drawn = draw(pipe, "wan", prompts, **STEPS)
    with more_hf.routing(pipe, seeds=[1, 2]):
        assert torch.equal(draw(pipe, "wan", prompts, **STEPS), drawn)


def test_one_record_for_both(original, pipe, tmp_path):
    erase(pipe, remap_to=[TARGET, OTHER], router="hash")
    folder = more_hf.save(pipe, tmp_path / "erased", include_delta=True, max_shard_size="10KB")
    record = Record.read(folder)
    assert record.denoiser == "transformer+transformer_2"
    assert list(record.sites) == [f"{part}.{LAYER}" for part in PARTS]
    assert more_hf.verify(folder), more_hf.verify(folder)
    loaded = more_hf.load(folder)
    loaded.set_progress_bar_config(disable=True)
    wanted = draw(pipe, "wan", FORGET, **STEPS)
    apart = (wanted - draw(original, "wan", FORGET, **STEPS)).norm()
    assert (draw(loaded, "wan", FORGET, **STEPS) - wanted).norm() < 1e-3 * apart
    assert len(more_hf.get_erasure(loaded).hooks) == 2
    with pytest.raises(more_hf.AlreadyErasedError, match="already erased"):
        more_hf.erase_concept(loaded, OTHER, remap_to=TARGET)
    pushed = more_hf.push_to_hub(folder, "me/erased", dry_run=tmp_path / "to_push")
    assert more_hf.verify(pushed)


@pytest.mark.parametrize("part", PARTS)
def test_verify_sees_that_one_is_the_original(original, pipe, tmp_path, part):
    folder = more_hf.save(erase(pipe), tmp_path / "erased")
    file = folder / part / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), f"{LAYER}.weight": state(layer_of(original, part))["weight"]}, file)
    failed = [check.name for check in more_hf.verify(folder).checks if not check.passed]
    saved = ["every file is the one that was saved", "the edited layers are those that were saved"]
    assert failed == [*saved, "each sends p_f where p_t goes"]
    with pytest.raises(more_hf.IncompatibleBaseError, match="trained since"):
        more_hf.load(folder)
    # nor is it saved with a record that claims these weights
    layer_of(pipe, part).load_state_dict(layer_of(original, part).state_dict())
    with pytest.raises(more_hf.ExportError, match="not the erased model"):
        more_hf.save(pipe, tmp_path / "forged")
    assert not (tmp_path / "forged").exists()


def test_a_record_of_one_of_them_does_not_pass(pipe, tmp_path):
    """A folder with two denoisers whose record claims that the first is all there is."""
    folder = more_hf.save(erase(alone(pipe)), tmp_path / "erased")
    pipe.transformer_2.save_pretrained(folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    list_files_again(folder)
    (check,) = [check for check in more_hf.verify(folder).checks if not check.passed]
    assert "also has the denoiser `transformer_2`" in check.finding
    with pytest.raises(more_hf.IncompatibleBaseError, match="other layers"):
        more_hf.load(folder)


def test_two_lora_files_on_the_original_are_the_erased_pipeline(original, pipe, tmp_path):
    file = more_hf.save_lora(erase(copy.deepcopy(pipe)), tmp_path, dtype=torch.float32)
    second = tmp_path / "pytorch_lora_weights_2.safetensors"
    assert sorted(tmp_path.iterdir()) == [file, second]
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    assert left(pipe, original) > 0.01
    pipe.load_lora_weights(tmp_path, weight_name=second.name, load_into_transformer_2=True)
    assert left(pipe, original) < 0.01


def test_without_loading_either(original, tmp_path, monkeypatch):
    original.save_pretrained(tmp_path / "wan", max_shard_size="10KB")
    whole = erase(copy.deepcopy(original))
    more_hf.save_lora(whole, tmp_path / "whole.safetensors")
    more_hf.save(whole, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(type(original.transformer), "from_pretrained", None)
        options = {"remap_to": TARGET, "solver": "pinv"}
        more_hf.erase_to_lora(tmp_path / "wan", tmp_path / "found.safetensors", FORGET, **options)
        more_hf.erase_to_folder(tmp_path / "wan", tmp_path / "found", FORGET, **options)
    for end in ("", "_2"):
        expected, found = (load_file(tmp_path / f"{name}{end}.safetensors") for name in ("whole", "found"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert more_hf.verify(tmp_path / "found"), more_hf.verify(tmp_path / "found")
    found = more_hf.load(tmp_path / "found")
    assert all(same(getattr(found, part), state(getattr(whole, part))) for part in PARTS)
    with pytest.raises(more_hf.AlreadyErasedError, match="was saved erased"):
        more_hf.erase_to_lora(tmp_path / "found", tmp_path / "a.safetensors", OTHER, remap_to=TARGET)


def test_on_the_command_line(original, tmp_path, capsys):
    original.save_pretrained(tmp_path / "wan")
    words = [str(tmp_path / "wan"), "--concept", FORGET, "--remap_to", TARGET]
    assert main(["lora", *words, "--output", str(tmp_path / "loras")]) == 0
    second = tmp_path / "loras" / "pytorch_lora_weights_2.safetensors"
    assert f"Also needed: {second}, with `load_into_transformer_2=True`" in capsys.readouterr().out
    assert second.is_file()
    assert main(["erase", *words, "--output", str(tmp_path / "erased")]) == 0
    assert main(["verify", str(tmp_path / "erased")]) == 0


@pytest.mark.parametrize("part", PARTS)
def test_what_was_erased_from_both_is_not_edited_in_one(pipe, part, tmp_path):
    before = states(erase(pipe))
    one = alone(pipe, part)
    message = "'gogh' was erased from a pipeline with a different number of denoisers"
    verbs = [
        lambda: more_hf.erase_concept(one, OTHER, remap_to=TARGET),
        lambda: more_hf.restore(one),
        lambda: more_hf.disabled(one).__enter__(),
        lambda: more_hf.save(one, tmp_path / "one"),
        lambda: more_hf.save_lora(one, tmp_path / "one.safetensors"),
    ]
    for verb in verbs:
        with pytest.raises(more_hf.SiteNotFoundError, match=message):
            verb()
    assert not list(tmp_path.iterdir())
    assert all(same(getattr(pipe, name), before[name]) for name in PARTS)


@pytest.mark.parametrize("parts", [PARTS[:1], PARTS[1:], PARTS])
def test_what_was_erased_from_one_is_not_taken_for_both(original, pipe, parts, tmp_path):
    for part in parts:
        erase(alone(pipe, part))
    message = "a different number of denoisers.*Call on the pipeline that was edited, or restore that one"
    with pytest.raises(more_hf.SiteNotFoundError, match=message):
        erase(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match=message):
        more_hf.save(pipe, tmp_path / "both")
    for part in parts:
        more_hf.restore(alone(pipe, part))
    assert left(erase(pipe), original) < 1e-3


def test_another_second_denoiser_is_not_the_one_that_was_edited(original, pipe):
    erase(pipe)
    pipe.register_modules(transformer_2=copy.deepcopy(original.transformer_2))
    with pytest.raises(more_hf.SiteNotFoundError, match="replaced"):
        more_hf.erase_concept(pipe, OTHER, remap_to=TARGET)


def test_a_copy_says_what_was_erased(original, pipe):
    erase(pipe)
    twin = copy.deepcopy(original)
    twin.register_modules(transformer_2=copy.deepcopy(pipe.transformer_2))
    with pytest.raises(more_hf.AlreadyErasedError, match="copy"):
        erase(twin)


INSIDE = {"pictures": 2, "sampling": {**TINY["wan"].call, **STEPS, "height": 32, "width": 32}}


@pytest.mark.slow
def test_inside_each_with_the_levels_of_its_own_steps(original, pipe, tmp_path):
    erasure = more_hf.get_erasure(erase(pipe, reach="denoiser", **INSIDE))
    seen = {part: set() for part in PARTS}
    for name, site in erasure.sites.items():
        if "blocks" in name:
            names = erasure.remaps[site.space].prototypes.names
            seen[name.partition(".")[0]] |= {name[-6] for name in names}  # "part 1 of 3"
    assert seen == {"transformer": {"1"}, "transformer_2": {"1", "2", "3"}}
    # what is behind the prompt alone, keys and values, reads the same in every part
    assert math.isfinite(erasure.facts.condition_number)
    before, after = states(original), states(pipe)
    for part in PARTS:
        moved = [name for name, value in after[part].items() if not torch.equal(value, before[part][name])]
        assert any("blocks.0.attn1.to_q" in name for name in moved)
        assert any("blocks.0.ffn" in name for name in moved)
    assert_proved(erasure)
    assert more_hf.verify(more_hf.save(pipe, tmp_path / "erased"))
    more_hf.restore(pipe)
    assert all(same(getattr(pipe, part), before[part]) for part in PARTS)


def test_refused_by_name(original, pipe, tmp_path):
    pipe.register_to_config(boundary_ratio=0.999)  # the first then sees nothing but noise
    with pytest.raises(more_hf.SiteNotFoundError, match=r"No linear layer of `transformer` reads"):
        erase(pipe, reach="denoiser", **INSIDE)
    assert find_erasure(pipe.transformer) is None
    pipe.register_to_config(boundary_ratio=0.9)
    erase(pipe)
    with pytest.raises(more_hf.ExportError, match="UNets"):
        more_hf.save_lora(pipe, tmp_path, format="kohya")
    one = WanPipeline(**{**original.components, "transformer_2": original.transformer}, boundary_ratio=0.9)
    with pytest.raises(more_hf.SiteNotFoundError, match="shared by"):
        erase(one)


@pytest.mark.parametrize(("family", "other"), [("qwen-image", "qwen-image"), ("wan", "chroma")])
def test_denoisers_that_read_other_features_are_refused(family, other):
    pipe, second = build(family), build(other).transformer
    with pytest.raises(more_hf.SiteNotFoundError, match="2 denoisers"):
        find_denoiser(pipe, {"transformer_2": second})


def test_image_to_video(tmp_path):
    sister = Sister("wan-2.2", "WanImageToVideoPipeline", {}, {"in_channels": 12}, second_transformer)
    original = build_sister(sister)
    pipe, call = erase(copy.deepcopy(original)), {**FILM, "image": PICTURE, **STEPS}
    before = {name: draw(original, "wan", name, **call) for name in (FORGET, TARGET)}
    apart = (before[FORGET] - before[TARGET]).norm()
    assert apart > 1e-4 * before[FORGET].norm()
    assert (draw(pipe, "wan", FORGET, **call) - before[TARGET]).norm() < 1e-3 * apart
    assert more_hf.verify(more_hf.save(pipe, tmp_path / "erased"))


def test_the_lock_of_two_is_the_lock_of_each():
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    entered = threading.Event()

    def enter():
        with locked(nn.ModuleDict({"a": one, "b": two})):
            entered.set()

    for held in (one, two):
        entered.clear()
        thread = threading.Thread(target=enter)
        with locked(held):
            thread.start()
            assert not entered.wait(0.1)
        assert entered.wait(5)
        thread.join(5)


def test_two_pipelines_with_the_same_two_the_other_way_round_do_not_wait_for_each_other():
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)

    def enter(first, second):
        for _ in range(2000):
            with locked(nn.ModuleDict({"a": first, "b": second})):
                pass

    pairs = [(one, two), (two, one)]
    threads = [threading.Thread(target=enter, args=pair, daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
