"""A LoRA from a folder: of the denoiser's shards only the layers that read text are read."""

import copy
import re

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanImagePipeline, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from support.families import FORGET, TARGET, build, denoiser_of, shorten

import more_hf
from more_hf.cli.main import main
from more_hf.saving import layers


pytestmark = pytest.mark.usefixtures("short_prompts")

# What is read of the denoiser (layers that read text, norms in front of them), and how many tensors that is.
READ = {
    "z-image": (r"cap_embedder\.0\.weight|cap_embedder\.1\.(weight|bias)", 3),
    "flux": (r"(context_embedder|time_text_embed\.text_embedder\.linear_1)\.(weight|bias)", 4),
    "sdxl": (r".*\.attn2\.to_[kv]\.weight|add_embedding\.linear_1\.(weight|bias)", 18),
}


@pytest.fixture
def shards(tmp_path):
    """A folder of a family, its denoiser in many files."""

    def save(family):
        folder = tmp_path / family
        pipe = build(family)
        pipe.save_pretrained(folder, max_shard_size="10KB")
        assert len(list((folder / ("unet" if hasattr(pipe, "unet") else "transformer")).glob("*.safe*"))) > 3
        return folder, pipe

    return save


@pytest.fixture
def read(monkeypatch):
    """The names of the tensors that are read of the denoiser's files."""
    names = []

    class Spy:
        def __init__(self, *args):
            self.file = safe_open(*args)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            names.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(layers, "safe_open", Spy)
    return names


@pytest.mark.parametrize("family", READ)
def test_the_file_is_that_of_the_whole_model(shards, read, tmp_path, monkeypatch, family):
    folder, pipe = shards(family)
    wanted = more_hf.save_lora(
        more_hf.erase_concept(copy.deepcopy(pipe), FORGET, remap_to=TARGET), tmp_path / "whole.safetensors"
    )

    def refuse(*args, **kwargs):
        raise AssertionError("the denoiser is loaded")

    monkeypatch.setattr(type(denoiser_of(pipe)), "from_pretrained", refuse)
    with pytest.raises(AssertionError, match="is loaded"):
        DiffusionPipeline.from_pretrained(folder)
    found = tmp_path / "layers.safetensors"
    erasure = more_hf.erase_to_lora(folder, found, FORGET, remap_to=TARGET)
    pattern, count = READ[family]
    assert len(set(read)) == count
    assert all(re.fullmatch(pattern, name) for name in read)
    assert not erasure.proof
    assert "was not run" in str(erasure)
    expected, tensors = load_file(wanted), load_file(found)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.any()


def test_on_the_command_line(shards, tmp_path, capsys):
    folder, _ = shards("flux")
    words = ["--concept", FORGET, "--remap_to", TARGET, "--layers_only", "--output", str(tmp_path / "lora")]
    assert main(["lora", str(folder), *words]) == 0
    assert "was not run" in capsys.readouterr().out
    more_hf.erase_to_lora(folder, tmp_path / "same.safetensors", FORGET, remap_to=TARGET)
    found = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    expected = load_file(tmp_path / "same.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert main(["lora", str(folder), *words, "--offload", "model"]) == 2
    assert "loads none" in capsys.readouterr().err
    assert main(["lora", str(folder), *words, "--reach", "denoiser"]) == 2
    assert "`--layers_only` loads no denoiser" in capsys.readouterr().err


def test_a_kohya_file_of_the_embedded_pipeline(tmp_path, monkeypatch):
    shorten(monkeypatch)
    out = tmp_path / "kohya.safetensors"
    more_hf.erase_to_lora(more_hf.data.FOLDER / "emoji_sd", out, "crab", remap_to="fish", format="kohya")
    with safe_open(out, "pt") as file:
        assert file.metadata()["modelspec.resolution"] == "64x64"


def test_refused_with_the_reason(shards, tmp_path):
    folder, pipe = shards("flux")
    edited = more_hf.save(more_hf.erase_concept(pipe, FORGET, remap_to=TARGET), tmp_path / "edited")
    with pytest.raises(more_hf.AlreadyErasedError, match="was saved erased"):
        more_hf.erase_to_lora(edited, tmp_path / "a.safetensors", "cat", remap_to=TARGET)
    with pytest.raises(more_hf.PrototypeError, match="both erased and in"):
        more_hf.erase_to_lora(folder, tmp_path / "a.safetensors", FORGET, remap_to=FORGET)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(more_hf.IncompatibleBaseError, match=r"Missing key.*Save or download it again"):
        more_hf.erase_to_lora(folder, tmp_path / "a.safetensors", FORGET, remap_to=TARGET)
    assert not (tmp_path / "a.safetensors").exists()


def test_two_denoisers_and_no_loader_are_refused(tmp_path):
    parts = build("wan").components
    pipe = WanPipeline(**{**parts, "transformer_2": copy.deepcopy(parts["transformer"])}, boundary_ratio=0.9)
    pipe.save_pretrained(tmp_path / "wan")
    with pytest.raises(more_hf.SiteNotFoundError, match="has 2 denoisers"):
        more_hf.erase_to_lora(tmp_path / "wan", tmp_path / "a.safetensors", FORGET, remap_to=TARGET)
    build("hunyuan-image").save_pretrained(tmp_path / "hunyuan")
    with pytest.raises(more_hf.ExportError, match=HunyuanImagePipeline.__name__):
        more_hf.erase_to_lora(tmp_path / "hunyuan", tmp_path / "a.safetensors", FORGET, remap_to=TARGET)
