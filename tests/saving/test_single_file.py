"""One checkpoint file under the original names: diffusers, OpenCLIP and literal names are the references."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from support.compare import state
from support.families import copied
from support.families import erase as erase_family
from support.originals import any_size
from support.pipelines import erase

import more_hf
from more_hf.saving.single_file import original_layout


def open_single_file(file, pipe, folder, cls=StableDiffusionPipeline, **kwargs):
    """With configs from a folder that holds no weights, so that all of them come from the file."""
    pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return cls.from_single_file(file, config=str(folder), local_files_only=True, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_through_diffusers(tiny_sd, tmp_path, version, dtype):
    pipe, original = erase(tiny_sd(version)), state(tiny_sd(version))
    file = more_hf.save_checkpoint(pipe, tmp_path / "new" / "erased.safetensors", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}

    opened = state(open_single_file(file, pipe, tmp_path / "configs", dtype=dtype))
    expected = {name: value.to(dtype) for name, value in state(pipe).items()}
    assert opened.keys() == expected.keys()
    assert all(torch.equal(opened[name], value) for name, value in expected.items())
    changed = {name for name, value in original.items() if not torch.equal(opened[name], value.to(dtype))}
    assert changed == {f"unet.{site}.weight" for site in more_hf.get_erasure(pipe).sites}


@pytest.mark.slow
@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_round_trip_of_other_families(families, tmp_path, monkeypatch, family):
    any_size(monkeypatch, family)
    pipe, original = erase_family(copied(families[family])), state(families[family])
    file = more_hf.save_checkpoint(pipe, tmp_path / "erased.safetensors", dtype=torch.float32)
    opened = state(open_single_file(str(file), pipe, tmp_path / "configs", type(pipe)))
    if family == "sd3":  # where diffusers takes the first CLIP's projection for the identity
        opened["text_encoder.text_projection.weight"] = original["text_encoder.text_projection.weight"]
    expected = state(pipe)
    assert opened.keys() == expected.keys()
    assert all(torch.equal(opened[name], value) for name, value in expected.items())
    changed = {
        name.split(".", 1)[1] for name, value in original.items() if not torch.equal(opened[name], value)
    }
    assert changed == {f"{site}.weight" for site in more_hf.get_erasure(pipe).sites}


@pytest.mark.slow
def test_embedded_pipeline_draws_the_same(copy_of_emoji_sd, tmp_path):
    pipe = erase(copy_of_emoji_sd(), "High Contrast", remap_to="Fluent")
    file = more_hf.save_checkpoint(pipe, tmp_path / "erased.safetensors")
    opened = open_single_file(file, pipe, tmp_path / "configs")
    opened.to(torch.float32)
    opened.set_progress_bar_config(disable=True)
    ask = {"prompt": "a house in the style of High Contrast", "num_inference_steps": 4, "output_type": "np"}

    def draw(pipe):
        return torch.tensor(pipe(**ask, generator=torch.Generator().manual_seed(0)).images)

    erased, again = draw(pipe), draw(opened)
    with more_hf.disabled(pipe):
        before = draw(pipe)
    assert (again - erased).abs().max() < 0.05  # the file is float16
    assert (again - before).abs().mean() > 0.1


def test_names_of_stable_diffusion_1(tiny_sd):
    """Known places in v1-5-pruned, on a UNet and a VAE of the real shapes without memory for them."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
    tensors = original_layout(StableDiffusionPipeline(**{**tiny_sd().components, "unet": unet, "vae": vae}))
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_v.weight": (1280, 768),
        "model.diffusion_model.middle_block.2.emb_layers.1.weight": (1280, 1280),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight": (32, 32),
    }
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    assert sum(name.startswith("model.diffusion_model.") for name in tensors) == 686
    assert sum(name.startswith("first_stage_model.") for name in tensors) == 248


def test_text_encoder_of_stable_diffusion_2_in_open_clip(tiny_sd):
    """OpenCLIP's own text tower, loaded with our names, gives the pipeline's features."""
    from open_clip.model import CLIPTextCfg, _build_text_tower

    pipe = tiny_sd("2")
    generator = torch.Generator().manual_seed(0)
    for parameter in pipe.text_encoder.parameters():  # fresh norms are all alike: a mix-up would not show
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    prefix = "cond_stage_model.model."
    own = [(name, value) for name, value in original_layout(pipe).items() if name.startswith(prefix)]
    state = {name.removeprefix(prefix): value for name, value in own}
    config = pipe.text_encoder.config
    size = {"vocab_size": config.vocab_size, "width": config.hidden_size, "heads": config.num_attention_heads}
    tower = _build_text_tower(32, CLIPTextCfg(context_length=48, layers=2, mlp_ratio=2, **size)).eval()
    missing, unexpected = tower.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["text_projection"], [])

    padded = {"padding": "max_length", "max_length": 48}
    tokens = pipe.tokenizer("a painting by van gogh", **padded, return_tensors="pt").input_ids

    def features():
        z = tower.token_embedding(tokens) + tower.positional_embedding
        return tower.ln_final(tower.transformer(z, attn_mask=tower.attn_mask))

    with torch.no_grad():
        expected = pipe.text_encoder(tokens).last_hidden_state
        assert torch.allclose(features(), expected, atol=1e-5)
        # the control: not q, k, v
        swapped = {name: value.roll(32, 0) if ".in_proj_" in name else value for name, value in state.items()}
        tower.load_state_dict(swapped, strict=False)
        assert not torch.allclose(features(), expected, atol=1e-2)


def test_says_what_it_is(tiny_sd, tmp_path):
    pipe = erase(tiny_sd(), {"van gogh": ["vincent"]})
    with safe_open(more_hf.save_checkpoint(pipe, tmp_path / "erased.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["more_hf"])["request"]["concepts"] == {"van gogh": ["vincent"]}


@pytest.mark.slow
def test_a_loaded_pipeline_without_factors(tiny_sd, tmp_path):
    loaded = more_hf.load(more_hf.save(erase(tiny_sd()), tmp_path / "erased"))
    assert more_hf.save_checkpoint(loaded, tmp_path / "erased.safetensors").is_file()


def refused(pipe, file, match):
    before = sorted(file.parent.parent.rglob("*"))
    with pytest.raises(more_hf.ExportError, match=match):
        more_hf.save_checkpoint(pipe, file)
    assert sorted(file.parent.parent.rglob("*")) == before


def test_refusals(tiny_sd, tmp_path):
    file, pipe = tmp_path / "here" / "file.safetensors", tiny_sd()
    refused(pipe, file, "Nothing was erased")
    erase(pipe)
    refused(pipe, file.with_suffix(".ckpt"), "cannot carry code")
    weight = pipe.unet.get_submodule(site := next(iter(more_hf.get_erasure(pipe).sites))).weight
    edited = weight.detach().clone()
    weight.data.copy_(more_hf.get_erasure(pipe).originals[site])
    refused(pipe, file, "still tells the concept from its target")
    weight.data.copy_(edited)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {"lora_A": torch.ones(1, 8), "lora_B": torch.ones(8, 1)}
    pipe.load_lora_weights({f"{layer}.{name}.weight": factor for name, factor in factors.items()})
    refused(pipe, file, "LoRA or adapter is loaded")
    pipe.unload_lora_weights()
    folder = more_hf.save(pipe, tmp_path / "saved")
    refused(pipe, folder / "sub" / "file.safetensors", "second set of weights")
    assert more_hf.save_checkpoint(pipe, file) == file


def test_another_model_has_no_place(tiny_sd, tmp_path):
    pipe = erase(tiny_sd(num_class_embeds=3))
    refused(pipe, tmp_path / "here" / "file.safetensors", "`class_embedding.*no place")
