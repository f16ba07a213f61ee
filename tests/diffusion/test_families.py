"""Every family, every verb: prompts as typed, through the pipeline's own template and encoders."""

import copy

import diffusers
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from support.bare import (
    FORGET,
    LENGTHS,
    OTHER,
    TARGET,
    build_bare,
    draw,
    erase,
    read_by_layers,
    use_bare_names,
)
from support.compare import assert_proved, changed, same, state
from support.families import MATRIX, TIME_IDS, TINY, Built, copied, denoiser_of, weights, with_expert
from support.hub import card_of
from support.language_models import qwen_tokenizer
from support.originals import original_of

import more_hf
from more_hf.core.views import experts_forced
from more_hf.diffusion.encoder import Encoder
from more_hf.diffusion.families import denoiser_names
from more_hf.diffusion.sites import find_denoiser
from more_hf.saving.lora import original_name


CPU = torch.device("cpu")
# Of what takes longest the fast tests see four: a layer that reads text with nothing in front, one behind a
# norm, one behind a norm of all samples joined, and a pooled one besides.
FOUR = ["chroma", "qwen-image", "z-image", "kandinsky-5"]
FOUR_FAST = [pytest.param(family, marks=() if family in FOUR else pytest.mark.slow) for family in MATRIX]
# The last layer of each space that a family reads; `test_proof.py` takes every layer
LAYERS = [
    (family, name)
    for family in MATRIX
    for name in {space: name for name, space in TINY[family].sites.items()}.values()
]
LOADS_NO_LORA = ["pixart", "hunyuan-image"]
WITH_LORA = [family for family in MATRIX if family not in LOADS_NO_LORA]
WITH_KOHYA = ["sd-1", "sd-2", "sdxl"]
WITH_CHECKPOINT = [*WITH_KOHYA, "sd3", "flux"]


@pytest.fixture(scope="module", autouse=True)
def bare_names():
    with pytest.MonkeyPatch.context() as patch:
        use_bare_names(patch, LENGTHS)
        yield


@pytest.fixture(scope="module")
def originals():
    """Not to be modified."""
    return Built(build_bare)


@pytest.fixture(scope="module")
def erased(originals):
    """The same, erased. Not to be modified."""
    return Built(lambda family: erase(copied(originals[family]), retain=[OTHER]))


@pytest.mark.parametrize("family", MATRIX)
def test_edits_exactly_the_layers_that_read_text(originals, erased, family):
    erasure = more_hf.get_erasure(erased[family])
    assert {name: site.space for name, site in erasure.sites.items()} == TINY[family].sites
    edited = changed(denoiser_of(erased[family]), weights(originals[family]))
    assert edited == {f"{name}.weight" for name in TINY[family].sites}
    many = len(erasure.remaps) > 3  # then the guarantees are the worst of each layer
    for space in erasure.remaps:
        prefix = {"tokens": "", "pooled": "pooled_"}.get(space, "layers_" if many else "")
        for key in ("forget_to_target", "remain_fixed", "idempotent", "nothing_left"):
            assert erasure.guarantees[prefix + key] < 1e-8
    assert_proved(erasure)


# of HunyuanImage, which joins all tokens before it
READS_THE_MEAN = "context_embedder.time_text_embed.text_embedder.linear_1"


@pytest.mark.parametrize("family", MATRIX)
def test_prototypes_are_what_the_layers_read_while_the_pipeline_draws(originals, erased, family):
    erasure = more_hf.get_erasure(erased[family])
    read = {name: read_by_layers(originals[family], family, name) for name in (FORGET, TARGET)}
    for site, space in TINY[family].sites.items():
        P = erasure.remap_of(site).prototypes
        kinds = [name.removeprefix(f"{FORGET} · ") for name in P.names if name.startswith(FORGET)]
        assert kinds == list(TINY[family].positions[space])
        for kind, position in TINY[family].positions[space].items():
            prototypes = [P[f"{name} · {kind}"] for name in (FORGET, TARGET)]
            for name, prototype in zip((FORGET, TARGET), prototypes, strict=True):
                z = read[name][site][:, : len(P.matrix)]  # behind the pooled text are the time ids
                if site == READS_THE_MEAN:
                    prototype, position = (P[f"{name} · last"] + P[f"{name} · end"]) / 2, 0
                assert torch.allclose(prototype, z[position], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(*prototypes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MATRIX)
def test_a_typed_name_gives_what_its_target_gives(originals, erased, family):
    before = {name: draw(originals[family], family, name) for name in (FORGET, TARGET, OTHER)}
    apart = (before[FORGET] - before[TARGET]).norm()
    assert apart > 1e-4 * before[FORGET].norm()
    for name, wanted in ((FORGET, TARGET), (TARGET, TARGET), (OTHER, OTHER)):
        assert (draw(erased[family], family, name) - before[wanted]).norm() < 1e-3 * apart
    with more_hf.disabled(erased[family]):
        assert torch.equal(draw(erased[family], family, FORGET), before[FORGET])


@pytest.mark.parametrize("family", FOUR_FAST)
def test_a_second_erasure_and_restore(originals, family):
    before, pipe = weights(originals[family]), erase(copied(originals[family]))
    more_hf.erase_concept(pipe, OTHER, remap_to=TARGET, solver="pinv", router="hash")
    assert more_hf.get_erasure(pipe).concepts == [FORGET, OTHER]
    assert more_hf.get_erasure(pipe).facts.rank == 2 * len(TINY[family].positions["tokens"])
    after = weights(pipe)
    with more_hf.disabled(pipe):
        assert same(denoiser_of(pipe), after)
    more_hf.restore(pipe)
    assert same(denoiser_of(pipe), before)
    assert not any(module._forward_pre_hooks for module in denoiser_of(pipe).modules())


@pytest.mark.parametrize("family", FOUR_FAST)
def test_every_sample_takes_its_own_expert(originals, family):
    pipe = erase(copied(originals[family]), remap_to=[TARGET, OTHER], router="random")
    erasure, prompts = more_hf.get_erasure(pipe), ["a house by gogh", "gogh"]
    wanted = [draw(with_expert(originals[family], erasure, i), family, prompts) for i in (0, 1)]
    assert (wanted[0] - wanted[1]).flatten(1).norm(dim=1).min() > 1e-4 * wanted[0].norm()
    with experts_forced(erasure, torch.tensor([0, 1])):
        found = draw(pipe, family, prompts)
    for i, expert in enumerate((0, 1)):
        apart = (wanted[0][i] - wanted[1][i]).norm()
        assert (found[i] - wanted[expert][i]).norm() < 0.01 * apart
    with more_hf.disabled(pipe):
        assert torch.equal(draw(pipe, family, prompts), draw(originals[family], family, prompts))
    with more_hf.routing(pipe, seeds=[1, 2]):
        first = draw(pipe, family, prompts)
    with more_hf.routing(pipe, seeds=[1, 2]):
        assert torch.equal(draw(pipe, family, prompts), first)


@pytest.mark.parametrize("family", FOUR_FAST)
def test_saved_pushed_and_loaded(originals, family, hub, tmp_path):
    pipe = erase(copied(originals[family]), remap_to=[TARGET, OTHER], router="hash")
    folder = more_hf.save(pipe, tmp_path / "erased", include_delta=True)
    assert more_hf.verify(folder), more_hf.verify(folder)
    more_hf.push_to_hub(folder, "me/erased", include_delta=True)
    assert "DiffusionPipeline.from_pretrained" in card_of(hub).text
    loaded = more_hf.load(hub.to_folder("me/erased", tmp_path / "downloaded_repo"))
    loaded.set_progress_bar_config(disable=True)
    assert same(denoiser_of(loaded), weights(pipe))
    erasure, again = more_hf.get_erasure(pipe), more_hf.get_erasure(loaded)
    assert again.to_dict() == erasure.to_dict() | {"base_revision": None}
    found, wanted = draw(loaded, family, FORGET), draw(pipe, family, FORGET)
    apart = (wanted - draw(originals[family], family, FORGET)).norm()
    assert (found - wanted).norm() < 1e-3 * apart
    # nothing but the text encoders to find the prototypes with
    assert more_hf.verify(more_hf.save(loaded, tmp_path / "again"))

    # each site is checked: the original's weights in one of them do not pass, in memory or in the file
    site = list(TINY[family].sites)[-1]
    original = denoiser_of(originals[family]).get_submodule(site).state_dict()
    denoiser_of(loaded).get_submodule(site).load_state_dict(original)
    with pytest.raises(more_hf.ExportError, match="not the erased model"):
        more_hf.save(loaded, tmp_path / "forged")
    part = next((folder / ("unet" if hasattr(pipe, "unet") else "transformer")).glob("*.safetensors"))
    save_file({**load_file(part), f"{site}.weight": original["weight"]}, part)
    assert not more_hf.verify(folder)
    with pytest.raises(more_hf.IncompatibleBaseError, match="fingerprint"):
        more_hf.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart"])
def test_plain_save_pretrained_is_erased(originals, erased, family, tmp_path):
    erased[family].save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert more_hf.get_erasure(loaded) is None
    wanted = draw(originals[family], family, TARGET)
    apart = (draw(originals[family], family, FORGET) - wanted).norm()
    assert (draw(loaded, family, FORGET) - wanted).norm() < 0.01 * apart


@pytest.mark.parametrize(("family", "site"), LAYERS)
@pytest.mark.parametrize("router", [None, pytest.param("random", marks=pytest.mark.slow)])
def test_the_proof_sees_a_missed_layer(originals, family, site, router):
    pipe = copied(originals[family])
    layer = denoiser_of(pipe).get_submodule(site)
    weight = layer.weight.detach().clone()
    layer.forward = lambda x: torch.nn.functional.linear(x, weight, layer.bias)
    before = weights(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="proof by run failed"):
        erase(pipe, router=router)
    assert same(denoiser_of(pipe), before)
    modules = list(denoiser_of(pipe).modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.slow
@pytest.mark.parametrize("family", MATRIX)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(originals, family, dtype):
    pipe = copy.deepcopy(originals[family]).to(dtype)
    for name, module in denoiser_of(pipe).named_modules():  # as `from_pretrained` does
        if name.split(".")[-1] in (denoiser_of(pipe)._keep_in_fp32_modules or ()):
            module.float()
    before = weights(pipe)
    erasure = more_hf.get_erasure(erase(pipe))
    for name, original in erasure.originals.items():
        remap, found = erasure.remap_of(name), denoiser_of(pipe).get_submodule(name).weight
        found = found[:, : erasure.sites[name].columns]
        exact = original.double() + original.double() @ remap.shift() @ remap.D_F
        assert found.dtype == dtype
        assert torch.equal(found, exact.to(dtype))
    more_hf.restore(pipe)
    assert same(denoiser_of(pipe), before)


def files_in(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# A layer with columns of its own, and two behind a norm; what is on the disk stays what it was
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("family", ["sdxl", "z-image", "qwen-image"])
def test_under_sequential_offload(originals, family, where, tmp_path):
    pipe, site = copied(originals[family]), list(TINY[family].sites)[-1]
    if where == "memory":
        cpu_offload(denoiser_of(pipe), CPU)
    else:
        disk_offload(denoiser_of(pipe), tmp_path, CPU)
    layer, files = denoiser_of(pipe).get_submodule(site), files_in(tmp_path)
    held = layer._hf_hook.weights_map
    erase(pipe)
    assert layer.weight.is_meta
    assert torch.equal(held["weight"], weights(erase(copied(originals[family])))[f"{site}.weight"])
    more_hf.restore(pipe)
    assert torch.equal(held["weight"], weights(originals[family])[f"{site}.weight"])
    assert files_in(tmp_path) == files
    assert (where == "disk") == (len(files) > 10)


@pytest.mark.parametrize("text_layers", ["cpu", "disk"])
def test_split_by_a_device_map(originals, erased, text_layers, tmp_path):
    pipe, model = copied(originals["flux"]), originals["flux"].transformer
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in model.named_children()}
    places |= dict.fromkeys(["context_embedder", "time_text_embed"], text_layers)
    folders = {"offload_folder": tmp_path / "offload", "device_map": places}
    pipe.register_modules(transformer=type(model).from_pretrained(tmp_path / "model", **folders))
    assert pipe.transformer.hf_device_map == places
    before, wanted = (draw(pipes["flux"], "flux", FORGET) for pipes in (originals, erased))
    files = files_in(tmp_path)
    apart = (before - wanted).norm()
    erase(pipe, retain=[OTHER])
    assert (draw(pipe, "flux", FORGET) - wanted).norm() < 1e-3 * apart
    more_hf.restore(pipe)
    assert (draw(pipe, "flux", FORGET) - before).norm() < 1e-3 * apart
    assert files_in(tmp_path) == files


@pytest.mark.parametrize(("family", "text"), [("sdxl", 20), ("kolors", 64)])
def test_the_columns_of_the_time_ids_stay(originals, erased, family, text):
    before, after = (weights(pipes[family])["add_embedding.linear_1.weight"] for pipes in (originals, erased))
    assert before.shape == (16, text + TIME_IDS)
    assert torch.equal(before[:, text:], after[:, text:])
    assert (before[:, :text] != after[:, :text]).any(0).all()


@pytest.mark.parametrize("family", MATRIX)
def test_what_the_report_says_is_left_open(erased, family):
    leaks = more_hf.get_erasure(erased[family]).facts.leaks
    assert any("`clip_skip`" in leak for leak in leaks) == (family in ("sd-1", "sd-2", "sdxl", "sd3"))
    both_cases = ("sd-1", "sd-2", "sdxl", "pixart", "sana")
    assert any("case-sensitive" in leak for leak in leaks) == (family not in both_cases)
    assert not any("pooled" in leak for leak in leaks)


# LoRA


@pytest.mark.parametrize(
    ("family", "format"),
    [*((family, "peft") for family in WITH_LORA), *((family, "kohya") for family in WITH_KOHYA)],
)
def test_lora_on_the_original_is_the_erased_pipeline(originals, erased, family, format, tmp_path):
    pipe = copied(originals[family])
    file = more_hf.save_lora(erased[family], tmp_path, format=format, dtype=torch.float32)
    tensors = load_file(file)
    assert len(tensors) == len(TINY[family].sites) * (3 if format == "kohya" else 2)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    wanted = draw(erased[family], family, FORGET)
    apart = (wanted - draw(originals[family], family, FORGET)).norm()
    assert (draw(pipe, family, FORGET) - wanted).norm() < 0.01 * apart

    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = weights(pipe)
    for name, value in weights(erased[family]).items():
        assert torch.allclose(fused[name], value, rtol=1e-4, atol=1e-5)


# What reads text -> its name in ComfyUI's model (`comfy/ldm`), from which its `comfy/lora.py` makes the key;
# for the others, `support/originals.py` converts the whole model back
AS_IN_DIFFUSERS = {"": ""}
COMFYUI = {
    "sd-1": {
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
    },
    "sdxl": {
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "add_embedding.linear_1": "label_emb.0.0",
    },
    "hunyuan-image": {
        "context_embedder.proj_in": "txt_in.input_embedder",
        "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.in_layer",
    },
    "kandinsky-5": AS_IN_DIFFUSERS,
    "hidream": AS_IN_DIFFUSERS,
}
NO_COMFYUI = ["kolors", "cogview-4"]
# `load_lora_weights` of diffusers applies these files too; those of FLUX it takes, and does nothing
READS_COMFYUI = ["z-image", "qwen-image"]


def in_comfyui(pipe, family):
    """The parameters of ComfyUI's model: all, or by their literal names those that are edited."""
    if family not in COMFYUI:
        return original_of(pipe, family)
    renamed = {}
    for layer in TINY[family].sites:
        start = next(start for start in COMFYUI[family] if layer.startswith(start))
        name = COMFYUI[family][start] + layer.removeprefix(start)
        renamed[f"{name}.weight"] = denoiser_of(pipe).get_submodule(layer).weight
    return renamed


@pytest.mark.parametrize("family", [name for name in MATRIX if name not in ("sd-2", *NO_COMFYUI)])
def test_patched_by_comfyui_it_is_the_erased_model(originals, erased, family, tmp_path):
    """ComfyUI adds up · down · alpha / rank to the parameter that a key without its end is named after."""
    lora = load_file(more_hf.save_lora(erased[family], tmp_path, format="comfyui", dtype=torch.float32))
    before, wanted = (in_comfyui(pipes[family], family) for pipes in (originals, erased))
    patched = dict(before)
    layers = [key.removesuffix(".alpha") for key in lora if key.endswith(".alpha")]
    for layer in layers:
        up, down, alpha = (
            lora[f"{layer}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        name = f"{layer.removeprefix('diffusion_model.')}.weight"
        patched[name] = before[name] + alpha / len(down) * up @ down
    assert 3 * len(layers) == 3 * len(TINY[family].sites) == len(lora)
    for name, value in wanted.items():
        assert torch.allclose(patched[name], value, rtol=1e-4, atol=1e-5)
    assert any(
        not torch.allclose(before[name], value, rtol=1e-4, atol=1e-5) for name, value in wanted.items()
    )


@pytest.mark.parametrize("family", READS_COMFYUI)
def test_diffusers_reads_what_is_for_comfyui(originals, erased, family, tmp_path):
    pipe = copied(originals[family])
    file = more_hf.save_lora(erased[family], tmp_path, format="comfyui", dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    wanted = draw(erased[family], family, FORGET)
    apart = (wanted - draw(originals[family], family, FORGET)).norm()
    assert (draw(pipe, family, FORGET) - wanted).norm() < 0.01 * apart


def test_what_comfyui_has_no_model_or_name_for(erased, tmp_path):
    for family in NO_COMFYUI:
        with pytest.raises(more_hf.ExportError, match="has no such model"):
            more_hf.save_lora(erased[family], tmp_path / "lora", format="comfyui")
    with pytest.raises(more_hf.ExportError, match="knows only context_embedder"):
        original_name(find_denoiser(erased["flux"]), "transformer_blocks.0.attn.to_q")
    with pytest.raises(more_hf.ExportError, match='Pass format="comfyui"'):
        more_hf.save_lora(erased["flux"], tmp_path / "lora", format="kohya")
    assert list(tmp_path.iterdir()) == []


def test_kohya_keys_of_sdxl(erased, tmp_path):
    tensors = load_file(more_hf.save_lora(erased["sdxl"], tmp_path, format="kohya"))
    layers = [name.replace(".", "_") for name in TINY["sdxl"].sites if "attn2" in name] + ["label_emb_0_0"]
    parts = ("alpha", "lora_down.weight", "lora_up.weight")
    assert tensors.keys() == {f"lora_unet_{name}.{part}" for name in layers for part in parts}
    pooled = tensors["lora_unet_label_emb_0_0.lora_down.weight"]
    assert pooled[:, :20].any()
    assert not pooled[:, 20:].any()  # the columns of the time ids
    assert pooled.shape == (3, 20 + TIME_IDS)


@pytest.mark.parametrize("format", ["peft", "kohya"])
@pytest.mark.parametrize("family", LOADS_NO_LORA)
def test_a_model_without_a_loader_has_no_lora(erased, family, format, tmp_path):
    with pytest.raises(more_hf.ExportError, match=f"LoRA into a {TINY[family].pipeline}"):
        more_hf.save_lora(erased[family], tmp_path / "lora", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", [family for family in MATRIX if family not in WITH_CHECKPOINT])
def test_a_model_without_an_original_layout_has_no_checkpoint(erased, family, tmp_path):
    with pytest.raises(more_hf.ExportError, match="Stable Diffusion 1.x"):
        more_hf.save_checkpoint(erased[family], tmp_path / "erased.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_later_lora_reads_the_routed_features(originals, erased, tmp_path):
    """The hook is on the norm: a LoRA wraps the layer behind it, and reads what the hook gives too."""
    pipe = erase(copied(originals["qwen-image"]), remap_to=[TARGET, OTHER], router="random")
    file = more_hf.save_lora(erased["qwen-image"], tmp_path, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    with experts_forced(more_hf.get_erasure(pipe), torch.tensor([0])):
        found = draw(pipe, "qwen-image", FORGET)
    # The LoRA's D_F reads nothing behind any expert: with it or without it is the target.
    before, wanted = (draw(originals["qwen-image"], "qwen-image", name) for name in (FORGET, TARGET))
    assert (found - wanted).norm() < 0.01 * (before - wanted).norm()


# Other


def test_a_name_inside_a_sentence_is_found_by_its_characters(originals):
    """A byte-level tokenizer spells a name with a space in front of it, or joined to a bracket."""
    encoder = Encoder(originals["z-image"])
    (segment,) = encoder.text.segments
    tokenizer = qwen_tokenizer()
    for template, tokens in (("{}", ["van", "Ġgogh"]), ("a cat by {}, a", ["Ġvan", "Ġgogh"])):
        start, stop, layout = encoder.place(template, "van gogh", segment)
        around = segment.template(originals["z-image"])
        ids = tokenizer(around.before + template.format("van gogh") + around.after).input_ids
        assert tokenizer.convert_ids_to_tokens(ids[start:stop]) == tokens
        assert tokenizer.convert_ids_to_tokens(ids[layout.end : layout.end + 1]) == ["<|im_end|>"]
        assert len(ids) == layout.stop


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        ("Krea2Transformer2DModel", "add their input"),
        ("GlmImageTransformer2DModel", "picture tokens"),
        ("OmniGenTransformer2DModel", "a language model"),
    ],
)
def test_what_no_edit_can_erase_from_is_refused_with_the_reason(cls, reason):
    with pytest.raises(more_hf.SiteNotFoundError, match=f"{cls}.*{reason}"):
        denoiser_names("SomePipeline", {"text_encoder": "Qwen3Model", "transformer": cls})
    assert hasattr(diffusers, cls)  # a class of this release, not a slip of the pen


def test_a_pipeline_that_is_refused_is_told_the_reason(originals):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_attention_heads": 2}
    rope = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    transformer = diffusers.OmniGenTransformer2DModel(**sizes, num_key_value_heads=1, rope_scaling=rope)
    parts = {name: originals["chroma"].components[name] for name in ("scheduler", "vae")}
    pipe = diffusers.OmniGenPipeline(transformer, **parts, tokenizer=qwen_tokenizer())
    before = state(transformer)
    with pytest.raises(more_hf.SiteNotFoundError, match="a language model"):
        erase(pipe)
    assert same(transformer, before)
