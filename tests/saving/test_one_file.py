"""Erase from one file: diffusers' `from_single_file` reads it, and a whole pipeline is the reference."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.families import FORGET, TARGET, copied, denoiser_of, images
from support.originals import any_size, original_of

import more_hf
from more_hf.cli.main import main
from more_hf.saving.single_file import original_layout


pytestmark = pytest.mark.usefixtures("short_prompts")
FAMILIES = ["sd-1", "sd-2", "sdxl", "sd3", "flux"]
UNREAD = ["pixart"]  # diffusers opens no original file of these


@pytest.fixture
def stored(families, tmp_path):
    """A factory: a family's folder, and its denoiser in one original file."""

    def store(family, dtype=torch.float32):
        pipe = families[family]
        folder, file = tmp_path / "folder", tmp_path / "original.safetensors"
        pipe.save_pretrained(folder)
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in original_of(pipe, family).items()}
        save_file(tensors, file, metadata={"format": "pt", "modelspec.title": "tiny"})
        return folder, file

    return store


def read_by_diffusers(file, pipe, folder):
    """The denoiser's tensors."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    cls = type(getattr(pipe, part))
    return cls.from_single_file(
        str(file), config=str(folder), subfolder=part, local_files_only=True
    ).state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_erased_model(families, stored, tmp_path, monkeypatch, family):
    any_size(monkeypatch, family)
    (folder, file), pipe = stored(family), families[family]
    before, bytes_before = read_by_diffusers(file, pipe, folder), file.read_bytes()
    original = denoiser_of(pipe).state_dict()
    assert before.keys() == original.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in original.items())

    out = tmp_path / "erased.safetensors"
    erasure = more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder=folder)
    assert "was not run" in str(erasure)
    assert file.read_bytes() == bytes_before
    erased = more_hf.erase_concept(copied(pipe), FORGET, remap_to=TARGET)
    expected, found = denoiser_of(erased).state_dict(), read_by_diffusers(out, pipe, folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    changed = {name for name, tensor in original.items() if not torch.equal(found[name], tensor)}
    assert changed == {f"{site}.weight" for site in more_hf.get_erasure(erased).sites}

    # nothing else in the file was touched, and it says what it is
    old, new = load_file(file), load_file(out)
    assert old.keys() == new.keys()
    assert sum(not torch.equal(new[name], tensor) for name, tensor in old.items()) == len(changed)
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata.pop("more_hf")
    assert metadata == {"format": "pt", "modelspec.title": "tiny"}
    assert more_hf.verify_file(out, text_encoder=folder), more_hf.verify_file(out, text_encoder=folder)


def test_a_file_with_its_text_encoders_needs_only_configurations(families, tmp_path):
    """Its own encoders make the prototypes: those of a fine-tune differ from the base's."""
    pipe = copied(families["sdxl"])
    pipe.save_pretrained(tmp_path / "configs")
    for weights in (tmp_path / "configs").rglob("*.safetensors"):
        weights.unlink()
    file, out = tmp_path / "all.safetensors", tmp_path / "erased.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in original_layout(pipe).items()}, file)
    more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder=tmp_path / "configs")

    opened = StableDiffusionXLPipeline.from_single_file(str(out), config=str(tmp_path / "configs"))
    before = StableDiffusionXLPipeline.from_single_file(str(file), config=str(tmp_path / "configs"))
    erased = more_hf.erase_concept(pipe, FORGET, remap_to=TARGET)
    expected = images(erased, "sdxl", FORGET)
    torch.testing.assert_close(images(opened, "sdxl", FORGET), expected, rtol=0, atol=1e-5)
    assert (images(before, "sdxl", FORGET) - expected).abs().mean() > 1e-3


def test_the_command(stored, tmp_path, capsys):
    folder, file = stored("flux")
    words = ["--concept", FORGET, "--remap_to", TARGET, "--text_encoder", str(folder), "--output"]
    out = tmp_path / "erased.safetensors"
    assert main(["erase", str(file), *words, str(out)]) == 0
    assert main(["verify", str(out), "--text_encoder", str(folder)]) == 0
    assert main(["verify", str(file), "--text_encoder", str(folder)]) == 2
    assert "say nothing of an erasure" in capsys.readouterr().err

    # the LoRA that the same words make is what the folder's is
    assert main(["lora", str(file), *words, str(tmp_path / "file.safetensors")]) == 0
    more_hf.erase_to_lora(folder, tmp_path / "folder.safetensors", FORGET, remap_to=TARGET)
    expected = load_file(tmp_path / "folder.safetensors")
    for name, tensor in load_file(tmp_path / "file.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def cut_in_the_header(file):
    file.write_bytes(file.read_bytes()[:200])


def saved(tensors):
    return lambda file: save_file({name: torch.zeros(2, 2) for name in tensors}, file)


def with_average(file):
    save_file({**load_file(file), "model_ema.diffusion_modeltxt_inweight": torch.zeros(2)}, file)


def in_fp8(file):
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "it was cut off"),
        (cut_in_the_header, "it was cut off"),
        (
            saved(["double_blocks.0.txt_attn.qkv.weight", "txt_in.weight"]),
            "nearest is Flux.*`vector_in",
        ),
        (saved(["a.weight"]), "no checkpoint of a known model"),
        (saved(["lora_unet_a.lora_up.weight"]), "is a LoRA"),
        (saved(["first_stage_model.decoder.conv_in.weight"]), "a VAE alone"),
        (with_average, "model_ema"),
        (in_fp8, "stored in fp8"),
    ],
)
def test_bad_input_is_refused_with_the_next_step(stored, tmp_path, damage, says):
    folder, file = stored("flux")
    damage(file)
    before = sorted(tmp_path.rglob("*")), file.read_bytes()
    with pytest.raises(more_hf.IncompatibleBaseError, match=says):
        more_hf.erase_file(file, tmp_path / "out.safetensors", FORGET, remap_to=TARGET, text_encoder=folder)
    assert (sorted(tmp_path.rglob("*")), file.read_bytes()) == before


def test_other_refusals(stored, tmp_path):
    folder, file = stored("flux")
    out = tmp_path / "out.safetensors"

    def refused(error, says, source=file, target=out, **options):
        with pytest.raises(error, match=says):
            more_hf.erase_file(source, target, FORGET, remap_to=TARGET, text_encoder=folder, **options)
        assert not out.exists()

    pickle = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(file)}, pickle)
    refused(more_hf.IncompatibleBaseError, "is a pickle", pickle, tmp_path / "out.ckpt")
    refused(more_hf.ExportError, "the original itself", target=file)
    refused(more_hf.ExportError, "should end in .safetensors", target=tmp_path / "out.ckpt")
    refused(more_hf.ExportError, "mean expert alone", router="random")
    refused(more_hf.PrototypeError, "not loaded here", reach="denoiser")
    with pytest.raises(more_hf.IncompatibleBaseError, match="Pass `text_encoder=`"):
        more_hf.erase_file(file, out, FORGET, remap_to=TARGET)
    more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder=folder)
    with pytest.raises(more_hf.AlreadyErasedError, match="was saved erased"):
        more_hf.erase_file(out, tmp_path / "b.safetensors", "cat", remap_to=TARGET, text_encoder=folder)


def test_a_full_disk_leaves_nothing(stored, tmp_path, monkeypatch):
    folder, file = stored("flux")
    before = sorted(tmp_path.rglob("*")), file.read_bytes()

    def full(source, target, length):
        target.write(source.read(1000))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(more_hf.ExportError, match="No space left on device.*make room"):
        more_hf.erase_file(file, tmp_path / "out.safetensors", FORGET, remap_to=TARGET, text_encoder=folder)
    assert (sorted(tmp_path.rglob("*")), file.read_bytes()) == before


def test_an_fp8_file_has_its_lora(stored, tmp_path):
    folder, file = stored("flux")
    in_fp8(file)
    erasure = more_hf.erase_to_lora(
        file, tmp_path / "lora.safetensors", FORGET, remap_to=TARGET, text_encoder=folder
    )
    weight = load_file(file)["txt_in.weight"].double()
    found = load_file(tmp_path / "lora.safetensors")
    up, down = (found[f"transformer.context_embedder.lora_{side}.weight"].double() for side in "BA")
    expected = erasure.remap.merged(weight.float()).double() - weight
    torch.testing.assert_close(up @ down, expected, rtol=1e-2, atol=1e-3)
