"""
The families from Chroma on: prompts as a user types them, through the pipeline's own template, text encoder
and norms.
"""

import copy

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from support.bare import FORGET, OTHER, POSITIONS, SITES, TARGET, draw, erase, read_by_layer, use_bare_names
from support.compare import assert_proved
from support.families import NEWER, build, copied, denoiser_of, weights
from support.language_models import qwen_tokenizer

import more_hf
from more_hf.core.views import experts_forced
from more_hf.diffusion.families import find_denoiser_name


WITH_LORA = [family for family in NEWER if family != "hunyuan-image"]

# Of what takes longest the fast tests see four: a layer that reads text with nothing in front, one behind a
# norm, one behind a norm of all samples joined, and a pooled one besides.
FOUR = ["chroma", "qwen-image", "z-image", "kandinsky-5"]
FOUR_FAST = [pytest.param(family, marks=() if family in FOUR else pytest.mark.slow) for family in NEWER]


@pytest.fixture(autouse=True)
def bare_names(monkeypatch, request):
    family = getattr(request.node, "callspec", None) and request.node.callspec.params.get("family")
    use_bare_names(monkeypatch, family)


@pytest.fixture(scope="module")
def originals():
    """Not to be modified."""
    return {family: build(family) for family in NEWER}


@pytest.mark.parametrize("family", NEWER)
def test_edits_exactly_the_layers_that_read_text(originals, family):
    pipe = erase(copied(originals[family]))
    before, after = weights(originals[family]), weights(pipe)
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in SITES[family])
    erasure = more_hf.get_erasure(pipe)
    assert list(erasure.sites) == SITES[family]
    for key in ("forget_to_target", "remain_fixed", "idempotent", "nothing_left"):
        assert erasure.guarantees[key] < 1e-8
    assert_proved(erasure)


@pytest.mark.parametrize("family", NEWER)
def test_prototypes_are_what_the_layer_reads_while_the_pipeline_draws(originals, family):
    P = more_hf.get_erasure(erase(copied(originals[family]))).remap.prototypes
    kinds = [name.removeprefix(f"{FORGET} · ") for name in P.names if name.startswith(FORGET)]
    assert kinds == list(POSITIONS[family])
    for name in (FORGET, TARGET):
        z = read_by_layer(originals[family], family, name).double()
        for kind, position in POSITIONS[family].items():
            assert torch.allclose(P[f"{name} · {kind}"], z[position], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(P[f"{FORGET} · last"], P[f"{TARGET} · last"], atol=1e-2)


@pytest.mark.parametrize("family", NEWER)
def test_a_typed_name_gives_what_its_target_gives(originals, family):
    original, pipe = originals[family], erase(copied(originals[family]))
    before = {name: draw(original, family, name) for name in (FORGET, TARGET)}
    apart = (before[FORGET] - before[TARGET]).norm()
    assert apart > 1e-3 * before[FORGET].norm()
    for name in (FORGET, TARGET):
        assert (draw(pipe, family, name) - before[TARGET]).norm() < 1e-3 * apart
    more_hf.restore(pipe)
    assert torch.equal(draw(pipe, family, FORGET), before[FORGET])


def with_expert(original, erasure, expert):
    """The original with W E_e in every site."""
    pipe = copied(original)
    for name, site in erasure.sites.items():
        remap, layer = erasure.remap_of(name), denoiser_of(pipe).get_submodule(name)
        reads_text = layer.weight.data[:, : site.columns]
        reads_text += (reads_text.double() @ remap.shift(expert) @ remap.D_F).float()
    return pipe


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
def test_save_load_and_verify(originals, family, tmp_path):
    pipe = erase(copied(originals[family]), remap_to=[TARGET, OTHER], router="hash")
    folder = more_hf.save(pipe, tmp_path / "erased", include_delta=True)
    assert more_hf.verify(folder), more_hf.verify(folder)
    loaded = more_hf.load(folder)
    loaded.set_progress_bar_config(disable=True)
    found, wanted = draw(loaded, family, FORGET), draw(pipe, family, FORGET)
    apart = (wanted - draw(originals[family], family, FORGET)).norm()
    assert (found - wanted).norm() < 1e-3 * apart
    assert more_hf.verify(more_hf.save(loaded, tmp_path / "again"))

    # the original's weights in one edited layer do not pass
    state = denoiser_of(originals[family]).get_submodule(SITES[family][-1]).state_dict()
    denoiser_of(loaded).get_submodule(SITES[family][-1]).load_state_dict(state)
    with pytest.raises(more_hf.ExportError, match="not the erased model"):
        more_hf.save(loaded, tmp_path / "forged")


@pytest.mark.parametrize("family", NEWER)
@pytest.mark.parametrize("router", [None, "random"])
def test_the_proof_sees_a_missed_layer(originals, family, router):
    pipe = copied(originals[family])
    layer = denoiser_of(pipe).get_submodule(SITES[family][-1])
    weight = layer.weight.detach().clone()
    layer.forward = lambda x: torch.nn.functional.linear(x, weight, layer.bias)
    before = weights(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="proof by run failed"):
        erase(pipe, router=router)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
    assert not any(module._forward_hooks for module in denoiser_of(pipe).modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", NEWER)
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
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


@pytest.mark.parametrize("family", WITH_LORA)
def test_lora_on_the_original_is_the_erased_pipeline(originals, family, tmp_path):
    pipe, erased = copied(originals[family]), erase(copied(originals[family]))
    file = more_hf.save_lora(erased, tmp_path, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    wanted = draw(erased, family, FORGET)
    apart = (wanted - draw(originals[family], family, FORGET)).norm()
    assert (draw(pipe, family, FORGET) - wanted).norm() < 0.01 * apart


# Layers as ComfyUI's `comfy/lora.py` spells them for a LoRA, where it knows them by their names in diffusers.
COMFYUI = {
    "chroma": {"transformer.context_embedder"},
    "z-image": {"transformer.cap_embedder.1"},
    "qwen-image": {"transformer.txt_in"},
    "klein": {"transformer.context_embedder"},
    "flux-2": {"transformer.context_embedder"},
    "auraflow": {"transformer.context_embedder"},
    "kandinsky-5": {"transformer.text_embeddings.in_layer", "transformer.pooled_text_embeddings.in_layer"},
    "hidream": {f"transformer.{name}" for name in SITES["hidream"]},
}


@pytest.mark.parametrize("family", WITH_LORA)
def test_what_comfyui_reads(originals, family, tmp_path):
    pipe = erase(copied(originals[family]))
    names = {name.rpartition(".lora_")[0] for name in load_file(more_hf.save_lora(pipe, tmp_path))}
    reads = "diffusers and ComfyUI read for" if family in COMFYUI else "ComfyUI does not, for"
    assert names == COMFYUI.get(family, names)
    with pytest.raises(more_hf.ExportError, match=reads):
        more_hf.save_lora(pipe, tmp_path, format="kohya")


def test_a_model_without_a_loader_has_no_lora(originals, tmp_path):
    pipe = erase(copied(originals["hunyuan-image"]))
    with pytest.raises(more_hf.ExportError, match="loads no LoRA into a HunyuanImagePipeline"):
        more_hf.save_lora(pipe, tmp_path)


def test_a_later_lora_reads_the_routed_features(originals, tmp_path):
    """The hook is on the norm: a LoRA wraps the layer behind it, and reads what the hook gives too."""
    pipe = erase(copied(originals["qwen-image"]), remap_to=[TARGET, OTHER], router="random")
    more_hf.save_lora(erase(copied(originals["qwen-image"])), tmp_path, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    with experts_forced(more_hf.get_erasure(pipe), torch.tensor([0])):
        found = draw(pipe, "qwen-image", FORGET)
    # The LoRA's D_F reads nothing behind any expert: with it or without it is the target.
    before, wanted = (draw(originals["qwen-image"], "qwen-image", name) for name in (FORGET, TARGET))
    assert (found - wanted).norm() < 0.01 * (before - wanted).norm()


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_a_norm_under_sequential_offload(originals, family):
    pipe = copied(originals[family])
    cpu_offload(pipe.transformer, torch.device("cpu"))
    site = SITES[family][0]
    held = pipe.transformer.get_submodule(site)._hf_hook.weights_map
    erase(pipe)
    wanted = weights(erase(copied(originals[family])))[f"{site}.weight"]
    assert torch.equal(held["weight"], wanted)


def test_a_name_inside_a_sentence_is_found_by_its_characters(originals):
    """A byte-level tokenizer spells a name with a space in front of it, or joined to a bracket."""
    encoder = more_hf.diffusion.encoder.Encoder(originals["z-image"])
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
        ("Krea2Transformer2DModel", "add their input to their output"),
        ("GlmImageTransformer2DModel", "picture tokens"),
        ("OmniGenTransformer2DModel", "a language model itself"),
    ],
)
def test_what_no_edit_can_erase_from_is_refused_with_the_reason(cls, reason):
    with pytest.raises(more_hf.SiteNotFoundError, match=f"cannot be edited .{cls}: .*{reason}"):
        find_denoiser_name("SomePipeline", {"text_encoder": "Qwen3Model", "transformer": cls})
    assert hasattr(diffusers, cls)  # a class of this release, not a slip of the pen


def test_a_pipeline_that_is_refused_is_told_the_reason(originals):
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    )
    pipe = diffusers.OmniGenPipeline(
        transformer, originals["chroma"].scheduler, originals["chroma"].vae, tokenizer=qwen_tokenizer()
    )
    with pytest.raises(more_hf.SiteNotFoundError, match="OmniGenTransformer2DModel: it is a language model"):
        erase(pipe)
