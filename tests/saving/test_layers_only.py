"""A LoRA, or another folder, from a folder: only the layers that read text are read of the shards."""

import copy
import os
import re
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanImagePipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from support.families import FORGET, TARGET, build, denoiser_of, shorten

import more_hf
from more_hf.cli.main import main
from more_hf.diffusion import kept, ordinary
from more_hf.diffusion.kept import KeptFeatures
from more_hf.saving import layers
from more_hf.saving.contents import DELTA


pytestmark = pytest.mark.usefixtures("short_prompts")

# What is read of the denoiser (layers that read text, norms in front of them), and how many tensors that is.
READ = {
    "z-image": (r"cap_embedder\.0\.weight|cap_embedder\.1\.(weight|bias)", 3),
    "flux": (r"(context_embedder|time_text_embed\.text_embedder\.linear_1)\.(weight|bias)", 4),
    "wan": (r"condition_embedder\.text_embedder\.linear_1\.(weight|bias)", 2),
    "sdxl": (r".*\.attn2\.to_[kv]\.weight|add_embedding\.linear_1\.(weight|bias)", 18),
}


@pytest.fixture
def shards(tmp_path):
    """A folder of a family, its denoiser in many files."""

    def save(family, dtype=torch.float32):
        folder = tmp_path / family
        pipe = build(family).to(dtype)
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
    erased = more_hf.erase_concept(copy.deepcopy(pipe), FORGET, remap_to=TARGET)
    wanted = more_hf.save_lora(erased, tmp_path / "whole.safetensors")

    not_loaded(pipe, monkeypatch)
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
    assert main(["lora", str(folder), *words, "--format", "comfyui"]) == 0
    keys = load_file(tmp_path / "lora" / "pytorch_lora_weights_comfyui.safetensors")
    layers = ("diffusion_model.txt_in", "diffusion_model.vector_in.in_layer")
    parts = ("alpha", "lora_down.weight", "lora_up.weight")
    assert sorted(keys) == [f"{layer}.{part}" for layer in layers for part in parts]
    assert main(["lora", str(folder), *words, "--offload", "model"]) == 2
    assert "loads none" in capsys.readouterr().err
    assert main(["lora", str(folder), *words, "--reach", "denoiser"]) == 2
    assert "`--layers_only` loads none" in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_text_encoder_gives_its_own_edit(shards, tmp_path, capsys, monkeypatch, bits):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # too small to be packed
    folder, _ = shards("sd-1")
    words = ["--concept", FORGET, "--remap_to", TARGET, "--output", str(tmp_path / "found")]
    words = ["lora", str(folder), *words, "--quantize_text_encoder", bits]
    assert main(words) == 2
    assert "is for `--layers_only`" in capsys.readouterr().err
    assert main([*words, "--layers_only"]) == 0
    assert f"bitsandbytes {bits[0]}-bit" in capsys.readouterr().out
    more_hf.erase_to_lora(folder, tmp_path / "wanted", FORGET, remap_to=TARGET)
    found, wanted = (change(tmp_path / name) for name in ("found", "wanted"))
    off = float((found - wanted).norm() / wanted.norm())
    assert off > 0
    assert (off < 0.1) == (bits == "8bit"), off  # this encoder is so small that 4 bits make another one of it


def change(folder):
    """What a LoRA of Stable Diffusion adds to one of the layers that read text."""
    factors = load_file(folder / "pytorch_lora_weights.safetensors")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    return factors[f"{layer}.lora_B.weight"].double() @ factors[f"{layer}.lora_A.weight"].double()


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
    for write in (more_hf.erase_to_lora, more_hf.erase_to_folder):
        with pytest.raises(more_hf.PrototypeError, match="not loaded here"):
            write(folder, tmp_path / "a", FORGET, remap_to=TARGET, reach="denoiser")
    with pytest.raises(more_hf.ExportError, match="'random'. would be lost"):
        more_hf.erase_to_lora(folder, tmp_path / "a.safetensors", FORGET, remap_to=TARGET, router="random")
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(more_hf.IncompatibleBaseError, match=r"Missing key.*Save or download it again"):
        more_hf.erase_to_lora(folder, tmp_path / "a.safetensors", FORGET, remap_to=TARGET)
    assert not list(tmp_path.glob("a*"))


def test_no_loader_is_refused(tmp_path):
    build("hunyuan-image").save_pretrained(tmp_path / "hunyuan")
    with pytest.raises(more_hf.ExportError, match=HunyuanImagePipeline.__name__):
        more_hf.erase_to_lora(tmp_path / "hunyuan", tmp_path / "a.safetensors", FORGET, remap_to=TARGET)


def not_loaded(pipe, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the denoiser is loaded")

    monkeypatch.setattr(type(denoiser_of(pipe)), "from_pretrained", refuse)


def tensors_of(folder):
    """The tensors of every file, by the file's folder and their names."""
    found = {}
    for file in folder.rglob("*.safetensors"):
        found |= {(file.parent.relative_to(folder), name): tensor for name, tensor in load_file(file).items()}
    return found


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("z-image", torch.bfloat16),
        ("flux", torch.float32),
        pytest.param("sdxl", torch.float32, marks=pytest.mark.slow),
        # for which there is no LoRA
        pytest.param("hunyuan-image", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_folder_is_that_of_the_whole_model(shards, read, tmp_path, monkeypatch, family, dtype):
    folder, pipe = shards(family, dtype)
    options = {"remap_to": [TARGET, "cat"], "router": "hash"}
    erased = more_hf.erase_concept(DiffusionPipeline.from_pretrained(folder, dtype=dtype), FORGET, **options)
    whole = more_hf.save(erased, tmp_path / "whole", include_delta=True)
    with monkeypatch.context() as patch:
        not_loaded(pipe, patch)
        erasure = more_hf.erase_to_folder(folder, tmp_path / "found", FORGET, include_delta=True, **options)
    assert "was not run" in str(erasure)
    if family in READ:
        assert all(re.fullmatch(READ[family][0], name) for name in read)

    found, expected, before = (tensors_of(place) for place in (tmp_path / "found", whole, folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found.items() if name in before)

    # it is what `save` writes: it passes `verify`, is loaded with its router, and goes up with a card
    assert more_hf.verify(tmp_path / "found"), more_hf.verify(tmp_path / "found")
    loaded = more_hf.load(tmp_path / "found", dtype=dtype)
    assert more_hf.get_erasure(loaded).hook is not None
    assert more_hf.push_to_hub(tmp_path / "found", "me/erased", dry_run=tmp_path / "to_push")


def test_the_shards_stay_as_they_are_cut(shards, tmp_path):
    folder, _ = shards("flux")
    more_hf.erase_to_folder(folder, tmp_path / "found", FORGET, remap_to=TARGET)
    places = (folder, tmp_path / "found")
    names, found = ({file.relative_to(place) for file in place.rglob("*.safetensors")} for place in places)
    assert found == names
    assert not (tmp_path / "found" / DELTA).exists()  # only if it is asked for


def test_a_source_that_would_be_copied_in_part_is_refused(shards, tmp_path):
    folder, _ = shards("flux")
    for file in (folder / "vae").glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(more_hf.IncompatibleBaseError, match="vae has no safetensors files"):
        more_hf.erase_to_folder(folder, tmp_path / "found", FORGET, remap_to=TARGET)
    assert not (tmp_path / "found").exists()


def test_a_folder_that_holds_the_original_is_not_mixed_with_it(shards, tmp_path):
    folder, _ = shards("flux")
    (tmp_path / "found" / "transformer").mkdir(parents=True)
    (tmp_path / "found" / "transformer" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(more_hf.ExportError, match="already holds"):
        more_hf.erase_to_folder(folder, tmp_path / "found", FORGET, remap_to=TARGET)
    assert [file.name for file in (tmp_path / "found").rglob("*.safetensors")] == ["model.safetensors"]


def test_a_denoiser_that_is_not_loaded_is_told_of_it(shards):
    _, pipe = shards("flux")
    pipe.transformer.to("meta")
    with pytest.raises(more_hf.SiteNotFoundError, match="erase_to_folder"):
        more_hf.erase_concept(pipe, FORGET, remap_to=TARGET)


def test_a_folder_on_the_command_line(shards, tmp_path, capsys):
    folder, _ = shards("flux")
    words = ["--concept", FORGET, "--remap_to", TARGET, "--layers_only", "--output", str(tmp_path / "found")]
    assert main(["erase", str(folder), *words]) == 0
    assert "was not run" in capsys.readouterr().out
    assert more_hf.verify(tmp_path / "found")
    for refused in (["--offload", "model"], ["--reach", "denoiser"], ["--compare", "a cat"]):
        assert main(["erase", str(folder), *words, *refused]) == 2
        assert "--layers_only` loads no" in capsys.readouterr().err


# Features on the disk: what a later call need not ask the text encoder for


@pytest.fixture
def loads(monkeypatch):
    """How often text encoders were loaded."""
    seen, load_into = [], KeptFeatures.load_into

    def counting(self, pipe):
        seen.extend([] if self._load is None else [type(pipe).__name__])
        load_into(self, pipe)

    monkeypatch.setattr(KeptFeatures, "load_into", counting)
    return seen


def factors(source, path, name=FORGET, **options):
    report = more_hf.erase_to_lora(source, path, name, remap_to=TARGET, dtype=torch.float32, **options)
    return load_file(path), report


MORE = [pytest.param(family, marks=pytest.mark.slow) for family in ("z-image", "sdxl", "sd-1")]


@pytest.mark.parametrize("family", ["flux", *MORE])
def test_a_second_time_no_text_encoder_is_loaded(shards, tmp_path, loads, family):
    folder, out = shards(family)[0], tmp_path / "lora.safetensors"
    first, report = factors(folder, out, retain=["cat"])
    assert len(loads) == 1
    again, report_again = factors(folder, out, retain=["cat"])
    factors(folder, out, retain=["cat"], strength=0.8, solver="soft")
    assert len(loads) == 1
    assert str(report) == str(report_again)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())

    # of a new name nobody has asked yet
    factors(folder, out, "a dog", also_encode=["a tree", "house"])
    assert len(loads) == 2
    ahead, _ = factors(folder, out, "a tree", retain=["house"])
    assert len(loads) == 2
    shutil.rmtree(kept.CACHE)
    anew, _ = factors(folder, out, "a tree", retain=["house"])
    assert len(loads) == 3
    for name, tensor in anew.items():
        torch.testing.assert_close(ahead[name], tensor, rtol=1e-3, atol=1e-5)
        assert tensor.any()


def test_another_text_encoder_is_loaded(shards, tmp_path, loads):
    folder, out = shards("flux")[0], tmp_path / "lora.safetensors"
    first, _ = factors(folder, out)
    file = next((folder / "text_encoder_2").glob("*.safetensors"))
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    os.utime(file, ns=times)  # as after an archive is unpacked
    second, _ = factors(folder, out)
    assert len(loads) == 2
    assert any(not torch.equal(second[name], tensor) for name, tensor in first.items())
    os.utime(file, ns=(times[0], times[1] + 1))
    factors(folder, out)
    assert len(loads) == 3


def test_damaged_features_are_made_again(shards, tmp_path, loads):
    folder, out = shards("flux")[0], tmp_path / "lora.safetensors"
    first, _ = factors(folder, out)
    for file in kept.CACHE.rglob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    second, _ = factors(folder, out)
    assert len(loads) == 2
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    factors(folder, out)
    assert len(loads) == 2


def test_without_a_place_for_features(shards, tmp_path, loads, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(kept, "CACHE", tmp_path / "file" / "cache")
    factors(shards("flux")[0], tmp_path / "lora.safetensors")
    assert loads
    assert "again next time" in caplog.text


def test_without_room_for_features(shards, tmp_path, monkeypatch, caplog):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(kept, "CACHE", tmp_path / "cache")
    for module in (kept, ordinary):
        monkeypatch.setattr(module, "save_file", full)
    factors(shards("flux")[0], tmp_path / "lora.safetensors")
    assert "loaded for 'a" in caplog.text
    assert "go through the text encoder again next time: I/O error" in caplog.text
    assert not [path for path in kept.CACHE.rglob("*") if path.is_file() and path.name != "weights"]
