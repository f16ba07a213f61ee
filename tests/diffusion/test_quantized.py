"""
Of a quantized pipeline, the layers that read text become plain ones in the computing precision, and the rest
stays quantized; `restore` puts the quantized ones back.
"""

import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from optimum.quanto import freeze, qint8, quantize
from safetensors.torch import load_file
from support import bare
from support.bare import FORGET, LENGTHS, OTHER, TARGET, erase, use_bare_names
from support.quantized import (
    CONFIGS,
    READERS,
    bitsandbytes_on_the_cpu,
    build_wide_flux,
    from_gguf,
    quantized,
    quanto_without_compiler,
)
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import more_hf
from more_hf.diffusion.quantized import precision_of, scheme_of


SCHEMES = [*CONFIGS, "GGUF", "layerwise casting"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers gives up quanto
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The original, saved in float32."""
    folder = tmp_path_factory.mktemp("flux")
    build_wide_flux().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    use_bare_names(monkeypatch, LENGTHS)
    bitsandbytes_on_the_cpu(monkeypatch)
    quanto_without_compiler(monkeypatch)


def draw(pipe, prompt=FORGET):
    return bare.draw(pipe, "flux", prompt)


def reader(pipe, name):
    return pipe.transformer.get_submodule(name)


def quantized_layers(pipe):
    return {name for name, layer in pipe.transformer.named_modules() if scheme_of(layer) is not None}


def left_plain(pipe):
    """What the configuration names as not quantized."""
    config = getattr(getattr(pipe.transformer, "hf_quantizer", None), "quantization_config", None)
    lists = ("llm_int8_skip_modules", "modules_to_not_convert")
    return [name for key in lists for name in getattr(config, key, None) or ()]


def answers(layer):
    """W of a layer, from what it answers: column by column."""
    width = layer.in_features
    bias = layer(torch.zeros(1, width))
    return (layer(torch.eye(width)) - bias).T.detach().double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layers_that_read_text_become_plain(folder, scheme):
    pipe = quantized(folder, scheme)
    before, all_layers = draw(pipe), quantized_layers(pipe)
    target, named = draw(pipe, TARGET), left_plain(pipe)
    layers = {name: reader(pipe, name) for name in READERS}
    weights = {name: answers(layer) for name, layer in layers.items()}
    assert set(READERS) < all_layers

    erasure = more_hf.get_erasure(erase(pipe))
    assert quantized_layers(pipe) == all_layers - set(READERS)
    for name in READERS:
        layer, remap = reader(pipe, name), erasure.remap_of(name)
        assert type(layer) is nn.Linear
        assert type(layer.weight.data) is torch.Tensor
        assert layer.weight.dtype == torch.float32
        # W E, written out in full
        P = remap.prototypes.matrix
        forgotten, to = P[:, list(remap.forget)], P[:, remap.targets[0]]
        edit = torch.eye(len(P)) + (to - forgotten) @ remap.D_F
        scale = weights[name].abs().max()
        near = 0.02 if scheme == "bitsandbytes 8-bit" else 1e-5
        assert (erasure.originals[name] - weights[name]).abs().max() < near * scale
        expected = erasure.originals[name].double() @ edit
        torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-4, atol=1e-5 * float(scale))

    # 8 bits of bitsandbytes also round what a layer reads, which the plain ones no longer do
    apart, rounding = (before - target).abs().max(), 0.5 if scheme == "bitsandbytes 8-bit" else 1e-4
    assert apart > 1e-3
    assert (draw(pipe) - draw(pipe, TARGET)).abs().max() < 1e-4 * apart
    assert (draw(pipe, TARGET) - target).abs().max() < rounding * apart
    with more_hf.disabled(pipe):
        assert (draw(pipe) - before).abs().max() < rounding * apart

    more_hf.restore(pipe)
    assert {name: reader(pipe, name) for name in READERS} == layers
    assert quantized_layers(pipe) == all_layers
    assert left_plain(pipe) == named
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_failing_proof_puts_the_quantized_layers_back(folder, scheme, monkeypatch):
    pipe = quantized(folder, scheme)
    before, layers = draw(pipe), {name: reader(pipe, name) for name in READERS}
    seen = []

    def fail(*args, **kwargs):
        seen.append(quantized_layers(pipe).intersection(READERS))
        raise KeyboardInterrupt

    monkeypatch.setattr("more_hf.diffusion.proof._prove_layers", fail)
    with pytest.raises(KeyboardInterrupt):
        erase(pipe)
    assert seen == [set()]  # they were plain then
    assert {name: reader(pipe, name) for name in READERS} == layers
    assert torch.equal(draw(pipe), before)
    assert more_hf.get_erasure(pipe) is None


@pytest.mark.parametrize(
    ("scheme", "skip", "named"),
    [
        ("torchao", None, READERS),
        ("bitsandbytes 4-bit", None, READERS),
        ("bitsandbytes 8-bit", None, READERS),
        ("quanto", ["linear_1"], ["context_embedder", "linear_1"]),
    ],
)
def test_saved_and_loaded_again(folder, tmp_path, scheme, skip, named):
    pipe = erase(quantized(folder, scheme, skip))
    erased, plain = draw(pipe), quantized_layers(pipe)
    saved = more_hf.save(pipe, tmp_path / "saved")
    config = json.loads((saved / "transformer" / "config.json").read_text())["quantization_config"]
    key = "llm_int8_skip_modules" if "bitsandbytes" in scheme else "modules_to_not_convert"
    assert sorted(config[key]) == named

    again = type(pipe).from_pretrained(saved, torch_dtype=torch.float32)  # plain diffusers
    again.set_progress_bar_config(disable=True)
    assert quantized_layers(again) == plain
    assert (draw(again) - erased).abs().max() < 1e-5
    assert (draw(again) - draw(quantized(folder, scheme))).abs().max() > 1e-3
    loaded = more_hf.load(saved, torch_dtype=torch.float32)
    assert more_hf.get_erasure(loaded).facts.dequantized == more_hf.get_erasure(pipe).facts.dequantized

    assert more_hf.verify(saved, run=True)
    quantized(folder, scheme, skip).transformer.save_pretrained(saved / "transformer")
    assert not more_hf.verify(saved)


@pytest.mark.parametrize("scheme", ["torchao", "bitsandbytes 4-bit"])
def test_a_layers_whole_name_leaves_no_other_layer_plain(folder, scheme):
    every = quantized_layers(quantized(folder, scheme))
    whole = READERS[1]
    others = {"time_text_embed.timestep_embedder.linear_1", "time_text_embed.guidance_embedder.linear_1"}
    assert every - quantized_layers(quantized(folder, scheme, [whole])) == {whole}
    assert every - quantized_layers(quantized(folder, scheme, ["linear_1"])) == {whole, *others}


def test_what_would_not_load_again_is_not_saved(folder, tmp_path):
    # the loader for quanto compares the last part of a name
    with pytest.raises(more_hf.ExportError, match=r"`time_text_embed\.\w+\.linear_1`.*'linear_1'"):
        more_hf.save(erase(quantized(folder, "quanto")), tmp_path / "saved")
    pipe = erase(from_gguf(folder))
    with pytest.raises(more_hf.ExportError, match="`transformer` is quantized by gguf, which"):
        more_hf.save(pipe, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()

    # what the message says to do: the LoRA differs by what Q8_0 rounds
    more_hf.save_lora(pipe, tmp_path / "lora.safetensors")
    original = type(pipe).from_pretrained(folder)
    original.set_progress_bar_config(disable=True)
    apart = (draw(original) - draw(original, TARGET)).abs().max()
    original.load_lora_weights(tmp_path / "lora.safetensors")
    assert (draw(original) - draw(original, TARGET)).abs().max() < 0.05 * apart


def test_layerwise_casting_is_saved_as_it_computes(folder, tmp_path):
    pipe = erase(quantized(folder, "layerwise casting"))
    erased = draw(pipe)
    saved = more_hf.save(pipe, tmp_path / "saved")
    assert more_hf.verify(saved, run=True)
    assert (draw(more_hf.load(saved, torch_dtype=torch.float32)) - erased).abs().max() < 1e-5


def quantized_by_torchao(pipe):
    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def quantized_by_quanto(pipe):
    quantize(pipe.transformer, weights=qint8)
    freeze(pipe.transformer)


def cast_to_fp8(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantized_by_torchao, "Int8Tensor"),
        (quantized_by_quanto, "2 edited layers were replaced since the edit"),
        (cast_to_fp8, "float8_e4m3fn"),
    ],
)
def test_quantized_after_the_edit(tmp_path, change, words):
    pipe = erase(build_wide_flux())
    erased = draw(pipe)
    change(pipe)
    assert (draw(pipe) - erased).abs().max() < 0.1  # it runs
    for call in (more_hf.restore, erase):
        with pytest.raises(more_hf.SiteNotFoundError, match=words):
            call(pipe)
    if change is not cast_to_fp8:
        with pytest.raises(more_hf.MoreError, match=r"quantized after it was loaded|were replaced"):
            more_hf.save(pipe, tmp_path / "saved")


def test_text_layers_that_were_left_plain(folder):
    for scheme in ("torchao", "bitsandbytes 4-bit"):
        pipe = quantized(folder, scheme, READERS)
        before, every = draw(pipe), quantized_layers(pipe)
        erased = erase(pipe)
        assert more_hf.get_erasure(erased).facts.dequantized == {}
        assert quantized_layers(pipe) == every
        assert (draw(pipe) - draw(pipe, TARGET)).abs().max() < 1e-4
        assert torch.equal(draw(more_hf.restore(pipe)), before)


def test_hooks_stay(folder):
    pipe = quantized(folder, "bitsandbytes 4-bit")
    layer, heard = reader(pipe, "context_embedder"), []
    handle = layer.register_forward_hook(lambda module, args, output: heard.append(type(module)))
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    before = draw(pipe)
    erase(pipe)
    heard.clear()
    draw(pipe)
    assert set(heard) == {nn.Linear}
    assert reader(pipe, "context_embedder")._hf_hook.execution_device == "cpu"
    handle.remove()
    heard.clear()
    assert torch.equal(draw(more_hf.restore(pipe)), before)
    assert heard == []


def test_a_second_erasure_still_restores_the_quantized_layers(folder):
    pipe = quantized(folder, "torchao")
    before, layers = draw(pipe), {name: reader(pipe, name) for name in READERS}
    more_hf.erase_concept(erase(pipe), OTHER, remap_to=TARGET, pooled=False)
    assert quantized_layers(pipe).isdisjoint(READERS[:1])
    more_hf.restore(pipe)
    assert {name: reader(pipe, name) for name in READERS} == layers
    assert torch.equal(draw(pipe), before)


def test_the_report_says_what_is_kept_plain(folder):
    pipe = erase(quantized(folder, "bitsandbytes 4-bit"), keep_originals=False)
    erasure = more_hf.get_erasure(pipe)
    assert erasure.facts.dequantized == dict.fromkeys(READERS, "bitsandbytes 4-bit")
    assert erasure.facts.extra_bytes == 2 * 64 * 64 * (4 - 0.5)
    kept = "2 layers, quantized before (bitsandbytes 4-bit) and not again: 0.0287 MB more"
    assert dict(erasure.rows())["kept plain"] == kept
    assert "kept plain" in erasure.explain()
    assert all(site.quantized is None for site in erasure.sites.values())
    with pytest.raises(more_hf.AlreadyErasedError):
        more_hf.restore(pipe)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inside_a_quantized_denoiser_a_lora_lies_beside_the_weights(folder, scheme, tmp_path):
    pipe, file = quantized(folder, scheme), tmp_path / "lora.safetensors"
    before, layers = draw(pipe), quantized_layers(pipe)
    small = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 3}
    options = {"reach": "denoiser", "pictures": 2, "sampling": small}
    with pytest.raises(more_hf.SiteNotFoundError, match=f"inside the denoiser are quantized.*{scheme}"):
        erase(pipe, **options)

    # what the message says to do
    options |= {"remap_to": TARGET, "dtype": torch.float32}
    report = more_hf.erase_to_lora(pipe, file, FORGET, **options)
    assert "beside the weights" in str(report)
    assert quantized_layers(pipe) == layers
    assert torch.equal(draw(pipe), before)
    found = load_file(file)
    inner = "transformer_blocks.0.attn.to_q"
    for name in (*READERS, inner):
        up, down = (found[f"transformer.{name}.lora_{side}.weight"].double() for side in "BA")
        near = 0.02 if scheme == "bitsandbytes 8-bit" else 1e-4
        weight = answers(reader(pipe, name))
        expected = report.remap_of(name).merged(weight.float()).double() - weight
        assert (up @ down - expected).norm() < max(near, 1e-3) * expected.norm()
        assert expected.norm() > 1e-3 * weight.norm()

    if scheme == "quanto":
        with pytest.raises(
            KeyError
        ):  # diffusers looks for a weight that these layers have under another name
            pipe.load_lora_weights(file)
        return
    if scheme == "layerwise casting":  # which would cast the factors, too
        pipe = type(pipe).from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(file)
        cast_to_fp8(pipe)
        assert (draw(pipe) - before).abs().max() > 1e-3
        return
    # whoever takes it off has the concept back
    pipe.load_lora_weights(file)
    assert (draw(pipe) - before).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)


def test_of_an_erased_pipeline_there_is_no_second_lora(folder, tmp_path):
    pipe = erase(quantized(folder, "torchao"))
    with pytest.raises(more_hf.AlreadyErasedError, match="Restore it first"):
        more_hf.erase_to_lora(pipe, tmp_path / "lora.safetensors", OTHER, remap_to=TARGET)
    assert not list(tmp_path.iterdir())


def test_prototypes_belong_to_a_precision_of_the_text_encoder(folder):
    """Fitted on another precision, the edit leaves a part of the name: about as much as that rounds."""
    plain = more_hf.get_erasure(erase(build_wide_flux(), pooled=False))
    assert plain.facts.fitted_on == {"text_encoder": "float32", "text_encoder_2": "float32"}
    left = {}
    for weights in ("qint8", "qint4"):
        pipe = build_wide_flux()
        quantize(pipe.text_encoder_2, weights=weights)
        freeze(pipe.text_encoder_2)
        erasure = more_hf.get_erasure(erase(pipe, pooled=False))
        assert erasure.facts.fitted_on["text_encoder_2"] == "float32, quanto"
        assert "text_encoder_2 in float32, quanto" in erasure.to_markdown()
        # the edit of the plain encoder, on the quantized one's prototypes, as a share of their way
        P, forget, to = erasure.remap.prototypes.matrix, list(erasure.remap.forget), erasure.remap.targets[0]
        way = P[:, forget] - P[:, to]
        moved = [remap.apply(P.T).T for remap in (plain.remap, erasure.remap)]
        own, other = ((m[:, forget] - m[:, to]).norm() / way.norm() for m in reversed(moved))
        assert own < 1e-6
        left[weights] = float(other)
    assert precision_of(pipe.text_encoder_2) == "float32, quanto"
    # measured: 1.2 % of the way with 8 bits, 19 % with 4
    assert 0.001 < left["qint8"] < left["qint4"] / 5
    assert left["qint4"] < 0.4


def pack(layer):
    """As bitsandbytes does in a pass on a CPU with AVX512-BF16; the packing itself runs on any."""
    weight = layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)


def test_what_bitsandbytes_packed_for_the_cpu_is_refused(folder, tmp_path):
    pipe = quantized(folder, "bitsandbytes 4-bit")
    erase(pipe)  # nothing was packed before
    pack(reader(pipe, "transformer_blocks.0.attn.to_q"))
    with pytest.raises(more_hf.ExportError, match="packed"):
        more_hf.save(pipe, tmp_path / "saved")
    more_hf.restore(pipe)
    pack(reader(pipe, READERS[0]))
    with pytest.raises(more_hf.SiteNotFoundError, match="packed for this CPU"):
        erase(pipe)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bitsandbytes_on_a_gpu(folder, monkeypatch):
    monkeypatch.undo()  # as diffusers loads it there
    use_bare_names(monkeypatch, LENGTHS)
    pipe = quantized(folder, "bitsandbytes 4-bit").to("cuda")
    before = draw(pipe)
    erase(pipe)
    assert (draw(pipe) - before).abs().max() > 1e-3
    assert (draw(pipe) - draw(pipe, TARGET)).abs().max() < 1e-4
    more_hf.restore(pipe)
    assert (draw(pipe) - before).abs().max() < 1e-6
