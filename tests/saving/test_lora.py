"""The LoRA of an erasure: in diffusers by running it, elsewhere by the documented key rules."""

import copy
import itertools
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.compare import same, state
from support.families import SD_BLOCKS, keys_and_values
from support.pipelines import TARGETS, erase

import more_hf
from more_hf.cli.main import main
from more_hf.core.request import ConceptRequest


PROMPT = "a painting of a house by van gogh"
PEFT, KOHYA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
# Rounding of the factors to half precision, in units of what the erasure changes; float32 is that of the
# weights and of the run.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}

EDITED = sorted(keys_and_values(SD_BLOCKS))
PEFT_KEYS = [f"unet.{layer}.{part}.weight" for layer in EDITED for part in ("lora_A", "lora_B")]
PARTS = ("alpha", "lora_down.weight", "lora_up.weight")
KOHYA_KEYS = [f"lora_unet_{layer.replace('.', '_')}.{part}" for layer in EDITED for part in PARTS]


@pytest.fixture(scope="module")
def pipes():
    """The original and the erased pipeline. Not to be modified."""
    from support.pipelines import build_tiny_sd

    return build_tiny_sd(), erase(build_tiny_sd())


@pytest.fixture
def erased(pipes):
    return pipes[1]


@pytest.fixture
def original(pipes):
    """An untouched pipeline of one's own."""
    return copy.deepcopy(pipes[0])


@torch.no_grad()
def output(pipe, prompt=PROMPT):
    """The denoiser's output for one prompt, on a fixed latent."""
    embeds, _ = pipe.encode_prompt(prompt, "cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(pipe.unet.dtype)
    return pipe.unet(latents, torch.tensor(500), encoder_hidden_states=embeds).sample.double()


def image(pipe):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="np").images
    ).double()


def assert_is(found, wanted, other, tolerance):
    """`found` is `wanted`, in units of how far `other` is from it; and that is far."""
    difference = (wanted - other).norm()
    assert difference > 0.005 * wanted.norm()
    assert (found - wanted).norm() < tolerance * difference


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_on_the_original_it_is_the_erased_pipeline(original, erased, tmp_path, format, dtype):
    before = output(original), image(original)
    file = more_hf.save_lora(erased, tmp_path / "lora", format=format, dtype=dtype)
    original.load_lora_weights(tmp_path / "lora", **({} if format == "peft" else {"weight_name": file.name}))

    assert_is(output(original), output(erased), before[0], ROUNDING[dtype])
    assert_is(image(original), image(erased), before[1], ROUNDING[dtype])
    original.unload_lora_weights()
    assert torch.equal(output(original), before[0])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_sd2_in_half_precision_with_a_router(tiny_sd, tmp_path, format):
    original, erased = tiny_sd("2").to(torch.float16), erase(tiny_sd("2").to(torch.float16), router="random")
    before = output(original)
    file = tmp_path / "a b.safetensors"
    assert more_hf.save_lora(erased, file, format=format) == file
    original.load_lora_weights(tmp_path, weight_name="a b.safetensors")

    mean = copy.deepcopy(erased)  # without the hook, so that it is the mean expert
    assert output(original).isfinite().all()
    assert_is(output(original.to(torch.float32)), output(mean.to(torch.float32)), before, 2e-2)
    with safe_open(file, "pt") as opened:
        said = [opened.metadata().get(name) for name in ("modelspec.architecture", "ss_v2")]
    assert said == ([None, None] if format == "peft" else ["stable-diffusion-v2-768-v/lora", "True"])


def test_whoever_has_the_file_and_the_erased_weights_has_the_concept_back(original, erased, tmp_path):
    public = copy.deepcopy(erased)  # no originals, nothing of more_hf: only the weights
    file = more_hf.save_lora(erased, tmp_path, dtype=torch.float32)
    public.load_lora_weights(file.parent, adapter_name="inverse")
    public.set_adapters("inverse", -1.0)
    assert_is(output(public), output(original), output(erased), 1e-4)


def test_names_dtypes_and_header(erased, tmp_path):
    files = [more_hf.save_lora(erased, tmp_path), more_hf.save_lora(erased, tmp_path, format="kohya")]
    assert files == [tmp_path / PEFT, tmp_path / KOHYA]
    assert sorted(tmp_path.iterdir()) == files  # no draft is left
    erasure = more_hf.get_erasure(erased)
    for file, keys in zip(files, (PEFT_KEYS, KOHYA_KEYS), strict=True):
        tensors = load_file(file)
        assert sorted(tensors) == keys
        for key, tensor in tensors.items():
            assert tensor.dtype is (torch.float32 if key.endswith(".alpha") else torch.float16)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata.pop("format") == "pt"
        record = json.loads(metadata.pop("more_hf"))
        assert ConceptRequest.from_dict(record["request"]) == erasure.request
        assert record["request"]["concepts"] == {"van gogh": []}
        assert record["fingerprint"] == erasure.facts.fingerprint
        if file.name == PEFT:
            assert metadata == {}  # `lora_adapter_metadata` would replace what loaders infer
    assert metadata.pop("modelspec.usage_hint").startswith(
        "Weight 1 on the original model erases, 0 does not."
    )
    assert metadata == {
        "ss_output_name": "Without_van_gogh", "ss_network_module": "networks.lora", "ss_network_dim": "4",
        "ss_network_alpha": "4", "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_sd_model_name": "",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": "Without van gogh",
        "modelspec.resolution": "32x32", "modelspec.prediction_type": "epsilon",
    }  # fmt: skip


def test_a_file_is_replaced_and_the_erased_pipeline_is_not_changed(erased, tmp_path):
    before = state(erased.unet)
    file = tmp_path / "new" / "van_gogh.safetensors"
    assert more_hf.save_lora(erased, file, dtype=torch.bfloat16) == file
    first = file.read_bytes()
    more_hf.save_lora(erased, str(file))
    assert file.read_bytes() != first
    assert list(file.parent.iterdir()) == [file]
    assert same(erased.unet, before)


@pytest.mark.slow
# Every surface form has four prototypes in token mode "positions", one in "last".
@pytest.mark.parametrize(
    ("concepts", "tokens", "rank"),
    [
        (["van gogh"], "last", 1),
        (["van gogh", "picasso"], "subject+end", 4),
        ({"van gogh": ["vincent"], "picasso": []}, "positions", 12),
    ],
)
def test_rank_is_the_number_of_forget_prototypes_in_every_layer(tiny_sd, tmp_path, concepts, tokens, rank):
    pipe = tiny_sd()
    weights = {name: value.double() for name, value in pipe.unet.state_dict().items()}
    erase(pipe, concepts, remap_to="claude monet", tokens=tokens, solver="pinv")
    remap = more_hf.get_erasure(pipe).remap
    state_dict = load_file(more_hf.save_lora(pipe, tmp_path, dtype=torch.float32))
    E = remap.apply(torch.eye(32, dtype=torch.float64)).T

    assert sorted(state_dict) == PEFT_KEYS
    for key in PEFT_KEYS[::2]:
        lora_A, lora_B = state_dict[key].double(), state_dict[key.replace("lora_A", "lora_B")].double()
        weight = weights[key.removeprefix("unet.").replace("lora_A.", "")]
        assert lora_A.shape == (rank, 32)
        assert lora_B.shape == (len(weight), rank)
        assert torch.allclose(lora_A.norm(dim=1), lora_B.norm(dim=0), rtol=1e-5)
        delta = weight @ E - weight
        assert (lora_B @ lora_A - delta).norm() < 1e-6 * delta.norm()


@pytest.mark.slow
def test_more_prototypes_than_a_layer_has_outputs(tiny_sd, tmp_path):
    several = {"concepts": ["van gogh", "picasso"], "tokens": "positions", "solver": "pinv"}
    original, erased = tiny_sd(), erase(tiny_sd(), **several)
    before = output(original)
    file = more_hf.save_lora(erased, tmp_path, format="kohya")
    tensors = load_file(file)
    assert {len(tensor) for key, tensor in tensors.items() if "lora_down" in key} == {8}
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {8.0}
    original.load_lora_weights(tmp_path, weight_name=file.name)
    assert_is(output(original), output(erased), before, 1e-2)


# Stable Diffusion 1.x and 2.x: where each attention is in the checkpoints that ComfyUI and A1111 run.
BLOCKS = {
    "down_blocks_0_attentions_0": "input_blocks_1_1",
    "down_blocks_0_attentions_1": "input_blocks_2_1",
    "down_blocks_1_attentions_0": "input_blocks_4_1",
    "down_blocks_1_attentions_1": "input_blocks_5_1",
    "down_blocks_2_attentions_0": "input_blocks_7_1",
    "down_blocks_2_attentions_1": "input_blocks_8_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_1_attentions_0": "output_blocks_3_1",
    "up_blocks_1_attentions_1": "output_blocks_4_1",
    "up_blocks_1_attentions_2": "output_blocks_5_1",
    "up_blocks_2_attentions_0": "output_blocks_6_1",
    "up_blocks_2_attentions_1": "output_blocks_7_1",
    "up_blocks_2_attentions_2": "output_blocks_8_1",
    "up_blocks_3_attentions_0": "output_blocks_9_1",
    "up_blocks_3_attentions_1": "output_blocks_10_1",
    "up_blocks_3_attentions_2": "output_blocks_11_1",
}
LAYERS = ("transformer_blocks_0_attn2_to_k", "transformer_blocks_0_attn2_to_v")


def in_comfyui(key):
    """Knows a module by its diffusers name with underscores after `lora_unet_`, and the suffixes."""
    pairs = itertools.product(BLOCKS.items(), LAYERS)
    known = {f"lora_unet_{block}_{layer}": f"{place}_{layer}" for (block, place), layer in pairs}
    return next((place for stem, place in known.items() if key in {f"{stem}.{part}" for part in PARTS}), None)


def in_a1111(key):
    """Rewrites what is before the first dot: three modules to a level, after the first convolution."""
    stem, _, part = key.partition(".")
    sides, middle = r"(down|up)_blocks_(\d+)_attentions_(\d+)_(.+)", r"mid_block_attentions_0_(.+)"
    found = re.fullmatch(rf"lora_unet_(?:{sides}|{middle})", stem)
    if found is None or part not in PARTS:
        return None
    side, level, index, layer, middle = found.groups()
    if middle:
        return f"middle_block_1_{middle}"
    number = 3 * int(level) + int(index)
    return f"input_blocks_{1 + number}_1_{layer}" if side == "down" else f"output_blocks_{number}_1_{layer}"


def test_comfyui_and_a1111_know_every_key(tiny_sd, tmp_path):
    pipe = tiny_sd(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=2,
    )  # the blocks of the real ones
    keys = list(load_file(more_hf.save_lora(erase(pipe), tmp_path, format="kohya")))
    modules = {name.replace(".", "_"): type(module) for name, module in pipe.unet.named_modules()}
    places = {f"{place}_{layer}" for place in BLOCKS.values() for layer in LAYERS}

    assert len(keys) == 3 * len(places) == 96
    for rule in (in_comfyui, in_a1111):
        assert {rule(key) for key in keys} == places
    for key in keys:
        assert in_comfyui(key) == in_a1111(key)
        assert modules[key.partition(".")[0].removeprefix("lora_unet_")] is torch.nn.Linear
    peft = load_file(more_hf.save_lora(pipe, tmp_path))
    assert {rule(key) for rule in (in_comfyui, in_a1111) for key in peft} == {None}


def test_refuses_what_is_not_erased(original, erased, tmp_path):
    with pytest.raises(more_hf.ExportError, match="Nothing was erased"):
        more_hf.save_lora(original, tmp_path / "lora")
    with pytest.raises(more_hf.AlreadyErasedError, match="copy"):
        more_hf.save_lora(copy.deepcopy(erased), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_refuses_without_the_original_weights(original, erased, tmp_path):
    loaded = more_hf.load(more_hf.save(erased, tmp_path / "erased"))
    for pipe in (loaded, erase(original, keep_originals=False)):
        with pytest.raises(more_hf.AlreadyErasedError, match="keep_originals"):
            more_hf.save_lora(pipe, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lora", {"format": "a1111"}, "Choose one of 'peft', 'kohya', 'comfyui'"),
        ("lora", {"format": ["peft"]}, "Choose one of 'peft', 'kohya', 'comfyui'"),
        ("lora", {"dtype": torch.int8}, "Choose one of torch.float16"),
        ("lora", {"dtype": "float16"}, "Choose one of torch.float16"),
        ("lora.ckpt", {}, "ends in .safetensors"),
    ],
)
def test_refuses_wrong_arguments(erased, tmp_path, name, options, said):
    with pytest.raises(more_hf.ExportError, match=said):
        more_hf.save_lora(erased, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_place_beside_erased_weights(erased, tmp_path):
    more_hf.save(erased, tmp_path / "erased")
    files = sorted(tmp_path.rglob("*"))
    for place in ("erased", "erased/lora", "erased/a.safetensors"):
        with pytest.raises(more_hf.ExportError, match="gets the concept back"):
            more_hf.save_lora(erased, tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == files
    assert more_hf.verify(tmp_path / "erased").ok


@pytest.mark.slow
# float16 is a multiple of 6e-8 and at most 65504; the factors are roots of what is scaled here.
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_refuses_what_half_precision_cannot_hold(original, tmp_path, scale):
    erasure = more_hf.get_erasure(erase(original))
    erasure.originals = {name: scale * weight for name, weight in erasure.originals.items()}
    with pytest.raises(more_hf.ExportError, match="does not fit torch.float16"):
        more_hf.save_lora(original, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert more_hf.save_lora(original, tmp_path / "lora", dtype=torch.float32).is_file()


@pytest.mark.slow
def test_command(original, tmp_path, capsys):
    original.save_pretrained(tmp_path / "base")
    request = ["lora", tmp_path / "base", "--concept", "van gogh", "--alias", "van gogh=vincent"]
    request += ["--remap_to", *TARGETS]
    assert main([str(arg) for arg in [*request, "--output", tmp_path / "lora"]]) == 0
    assert f"Saved to {tmp_path / 'lora' / PEFT}" in capsys.readouterr().out
    options = "--format kohya --dtype float32 --tokens last --output"
    argv = [*request, *options.split(), tmp_path / "a.safetensors"]
    assert main([str(arg) for arg in argv]) == 0

    before = output(original)
    erased = erase(copy.deepcopy(original), concepts={"van gogh": ["vincent"]})
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / PEFT).values()} == {torch.float16}
    original.load_lora_weights(tmp_path / "lora")
    assert_is(output(original), output(erased), before, 1e-2)
    tensors = load_file(tmp_path / "a.safetensors")
    assert sorted(tensors) == KOHYA_KEYS
    down = [tensor for key, tensor in tensors.items() if "lora_down" in key]
    assert {(tensor.dtype, tensor.shape[:-1]) for tensor in down} == {(torch.float32, (2,))}


def test_command_fails_in_one_line(original, tmp_path, capsys):
    original.save_pretrained(tmp_path / "base")
    base, file = tmp_path / "base", tmp_path / "lora.pt"
    argv = ["lora", base, "--concept", "van gogh", "--remap_to", "none", "--output", file]
    assert main([str(arg) for arg in argv]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"Error: {file} would be a pickle.")
    assert not file.exists()
