"""Erase from one file: diffusers' `from_single_file` reads it, and a whole pipeline is the reference."""

import re
import shutil
from types import SimpleNamespace

import gguf
import numpy as np
import open_clip
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.loaders.single_file_utils import LDM_UNET_KEY as PREFIX
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.families import FORGET, TARGET, build, copied, denoiser_of, images
from support.originals import COUNTED, RENAMED, any_size, original_of
from transformers import CLIPTextConfig

import more_hf
from more_hf.cli.main import main
from more_hf.data import FOLDER
from more_hf.diffusion.sites import find_denoiser
from more_hf.saving import one_file
from more_hf.saving.lora import original_name
from more_hf.saving.one_file import clip_tokenizer
from more_hf.saving.original import origins
from more_hf.saving.single_file import _rename, original_layout, unet_names


pytestmark = pytest.mark.usefixtures("short_prompts")
FAMILIES = ["sd-1", "flux", "z-image"]
MORE = ["sdxl", "sd3", "sd-2", "chroma", "flux-2", "klein", "lumina-2", "qwen-image", "wan", "auraflow"]
MORE += ["sana", "hidream"]
FAMILIES += [pytest.param(family, marks=pytest.mark.slow) for family in MORE]


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
    # the text encoders of the same folder, so that both edits are fitted on the very same features
    erased = more_hf.erase_concept(type(pipe).from_pretrained(folder), FORGET, remap_to=TARGET)
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

    # and the whole pipeline draws what the erased one draws
    loaded = more_hf.load_file(out, text_encoder=folder)
    assert str(more_hf.get_erasure(loaded)) == str(erasure)
    expected = images(erased, family, FORGET)
    torch.testing.assert_close(images(loaded, family, FORGET), expected, rtol=0, atol=1e-5)
    assert (images(pipe, family, FORGET) - expected).abs().mean() > 1e-4
    with pytest.raises(more_hf.AlreadyErasedError):
        more_hf.erase_concept(loaded, "cat", remap_to=TARGET)


@pytest.mark.slow
def test_one_of_two_denoisers(tmp_path):
    """Each of Wan 2.2 has a file of its own, and the prototypes are the same for both."""
    pipe, folder = build("wan-2.2"), tmp_path / "folder"
    pipe.save_pretrained(folder)
    erased = more_hf.erase_concept(build("wan-2.2"), FORGET, remap_to=TARGET)
    for name in ("transformer", "transformer_2"):
        file, out = tmp_path / f"{name}.safetensors", tmp_path / f"{name}_erased.safetensors"
        save_file(original_of(SimpleNamespace(transformer=getattr(pipe, name)), "wan"), file)
        more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder=folder)
        expected, before = getattr(erased, name).state_dict(), getattr(pipe, name).state_dict()
        read = WanTransformer3DModel.from_single_file(str(out), config=str(folder), subfolder=name)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in read.state_dict().items())
        assert any(not torch.equal(tensor, expected[key]) for key, tensor in before.items())
        with pytest.raises(more_hf.IncompatibleBaseError, match="one of the 2 denoisers"):
            more_hf.load_file(out, text_encoder=folder)


def test_a_family_that_diffusers_opens_no_file_of(families, stored, tmp_path):
    folder, file = stored("pixart")
    out = tmp_path / "erased.safetensors"
    more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder=folder)
    erased = more_hf.erase_concept(copied(families["pixart"]), FORGET, remap_to=TARGET)
    old, new = load_file(file), load_file(out)
    expected = erased.transformer.caption_projection.linear_1.weight
    with pytest.raises(more_hf.IncompatibleBaseError, match="opens no file of a PixArtTransformer2DModel"):
        more_hf.load_file(out, text_encoder=folder)
    assert torch.equal(new.pop("y_embedder.y_proj.fc1.weight"), expected)
    assert not torch.equal(old.pop("y_embedder.y_proj.fc1.weight"), expected)
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


@pytest.mark.parametrize("family", [*COUNTED, *RENAMED, "sd-2", "sdxl"])
def test_the_layers_have_the_names_of_a_lora_for_comfyui(families, family):
    """Two sources, diffusers' conversion and the table behind `format="comfyui"`, name the same tensors."""
    denoiser = find_denoiser(families[family])
    cls, config = type(denoiser.module).__name__, denoiser.module.config
    made_of = origins(cls, config, original_of(families[family], family))
    for layer in denoiser.find():
        (part,) = made_of[f"{layer}.weight"].parts
        assert part.name.removeprefix(PREFIX) == f"{original_name(denoiser, layer)}.weight"


@pytest.mark.slow
def test_known_sizes_of_the_packaged_configurations():
    """The numbers of parameters that their publishers state."""
    sizes = {"sd-1/unet": 859_520_964, "sd-2/unet": 865_910_724, "sdxl/unet": 2_567_463_684}
    sizes |= {"sd-1/text_encoder": 123_060_480, "sd-2/text_encoder": 340_387_840}
    sizes |= {"sdxl/text_encoder": 123_060_480, "sdxl/text_encoder_2": 694_659_840}
    sizes |= {"sd-1/vae": 83_653_863, "sdxl/vae": 83_653_863}
    for place, size in sizes.items():
        folder = FOLDER / "configs" / place
        with torch.device("meta"):
            if place.endswith(("unet", "vae")):
                cls = UNet2DConditionModel if place.endswith("unet") else AutoencoderKL
                model = cls.from_config(cls.load_config(folder))
            else:
                (cls,) = CLIPTextConfig.from_pretrained(folder).architectures
                model = getattr(transformers, cls)(CLIPTextConfig.from_pretrained(folder))
        assert sum(parameter.numel() for parameter in model.parameters()) == size, place


def test_the_packaged_tokenizer_is_the_one_of_open_clip():
    texts = ["a Photo by Vincent van Gogh, 1889", "", "naïve café's #1 😀 x" * 9]
    for pad, id in (("!", 0), ("<|endoftext|>", 49407)):
        found = clip_tokenizer(pad)(texts, padding="max_length", truncation=True)["input_ids"]
        expected = open_clip.tokenize(texts)
        for own, row in zip(found, expected.tolist(), strict=True):
            end = row.index(49407) + 1
            assert own == row[:end] + [id] * (77 - end)


@pytest.mark.slow
def test_a_file_of_the_real_layout_needs_no_folder(tmp_path):
    """Stable Diffusion 1.5's names; of the denoiser only what reads text has its real shape, for room."""
    configs = FOLDER / "configs" / "sd-1"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet"))
    names, tensors = unet_names(unet), {}
    for name, tensor in unet.state_dict().items():
        reads_text = re.search(r"attn2\.to_[kv]", name) is not None
        tensors[PREFIX + _rename(name, names)] = torch.randn(tensor.shape) if reads_text else torch.zeros(1)
    text = transformers.CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    for name, tensor in text.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    file, out = tmp_path / "original.safetensors", tmp_path / "erased.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors.items()}, file)
    more_hf.erase_file(file, out, "Van Gogh", remap_to="Monet")
    assert more_hf.verify_file(out), more_hf.verify_file(out)
    old, new = load_file(file), load_file(out)
    changed = {name for name, tensor in old.items() if not torch.equal(new[name], tensor)}
    assert changed == {name for name in old if re.search(r"attn2\.to_[kv]", name)}
    assert len(changed) == 32


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_file_with_its_text_encoders_needs_only_configurations(families, tmp_path, monkeypatch, family):
    """Its own encoders make the prototypes: those of a fine-tune differ from the base's."""
    any_size(monkeypatch, family)
    pipe, configs = copied(families[family]), tmp_path / "configs"
    pipe.save_pretrained(configs)
    for weights in configs.rglob("*.safetensors"):
        weights.unlink()
    file, out = tmp_path / "all.safetensors", tmp_path / "erased.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in original_layout(pipe).items()}, file)
    more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder=configs)

    opened, before = (type(pipe).from_single_file(str(place), config=str(configs)) for place in (out, file))
    for encoder in (opened.text_encoder_2, before.text_encoder_2):
        encoder.eval()  # which diffusers forgets for T5
    expected = images(more_hf.erase_concept(pipe, FORGET, remap_to=TARGET), family, FORGET)
    torch.testing.assert_close(images(opened, family, FORGET), expected, rtol=0, atol=1e-5)
    assert (images(before, family, FORGET) - expected).abs().mean() > 1e-4


def test_a_hub_id_brings_the_text_encoders_alone(stored, tmp_path, monkeypatch):
    folder, file = stored("flux")
    wanted = sorted(path for path in folder.rglob("*") if path.is_file())

    def download(name, allow_patterns, ignore_patterns):
        brought = filter_repo_objects(
            (path.relative_to(folder).as_posix() for path in wanted),
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        for path in brought:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / path, tmp_path / name / path)
        return str(tmp_path / name)

    monkeypatch.setattr(one_file, "snapshot_download", download)
    out = tmp_path / "erased.safetensors"
    more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder="me/flux")
    encoders = {"text_encoder", "text_encoder_2"}
    assert {path.parent.name for path in (tmp_path / "me").rglob("*.safetensors")} == encoders
    assert more_hf.verify_file(out, text_encoder=folder)
    any_size(monkeypatch, "flux")
    more_hf.load_file(out, text_encoder="me/flux")  # to draw, with the VAE
    assert {path.parent.name for path in (tmp_path / "me").rglob("*.safetensors")} == {*encoders, "vae"}


def test_the_command(stored, tmp_path, capsys):
    folder, file = stored("flux")
    words = ["--concept", FORGET, "--remap_to", TARGET, "--text_encoder", str(folder), "--output"]
    out = tmp_path / "erased.safetensors"
    assert main(["erase", str(file), *words, str(out)]) == 0
    assert main(["verify", str(out), "--text_encoder", str(folder)]) == 0
    assert main(["verify", str(file), "--text_encoder", str(folder)]) == 2
    assert "say nothing of an erasure" in capsys.readouterr().err
    assert main(["erase", "missing.safetensors", *words, str(out)]) == 2
    assert "There is no folder 'missing.safetensors'. A model is a folder, a file" in capsys.readouterr().err

    # the LoRA that the same words make is what the folder's is
    assert main(["lora", str(file), *words, str(tmp_path / "file.safetensors")]) == 0
    more_hf.erase_to_lora(folder, tmp_path / "folder.safetensors", FORGET, remap_to=TARGET)
    expected = load_file(tmp_path / "folder.safetensors")
    for name, tensor in load_file(tmp_path / "file.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    # ComfyUI's names are those of the file
    assert main(["lora", str(file), *words, str(tmp_path / "own.safetensors"), "--format", "comfyui"]) == 0
    keys = {
        name.split(".lora_")[0].removesuffix(".alpha") for name in load_file(tmp_path / "own.safetensors")
    }
    assert keys == {"diffusion_model.txt_in", "diffusion_model.vector_in.in_layer"}
    assert {f"{key.removeprefix('diffusion_model.')}.weight" for key in keys} <= load_file(file).keys()


@pytest.mark.slow
def test_pictures_before_and_after(stored, tmp_path, capsys):
    (folder, file), out = stored("sd-1"), tmp_path / "erased.safetensors"
    more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder=folder)
    more = ["--prompts", FORGET, "--text_encoder", str(folder), "--steps", "2"]

    def compare(*words):
        status = main(["compare", *map(str, words), *more, "--output", str(tmp_path / "grid.png")])
        return capsys.readouterr().err if status else np.asarray(Image.open(tmp_path / "grid.png"), dtype=int)

    sheet = compare(out)  # the metadata tell the original
    assert np.array_equal(sheet, compare(out, "--original", file))
    assert np.array_equal(sheet, compare(out, "--original", folder))
    pictures = sheet[:, -128 - 4 : -4]
    before, after, target = (pictures[len(sheet) - i * 132 :][:128] for i in (3, 2, 1))
    # up to the rounding of dim pictures to whole numbers
    assert np.abs(after - target).mean() < 0.5 * np.abs(before - target).mean()

    assert "nothing to compare" in compare(file)
    assert "is erased, too" in compare(out, "--original", out)
    file.unlink()
    assert len(compare(out)) == len(sheet) - 2 * 132  # after alone


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
        (saved(["double_blocks.0.txt_attn.qkv.weight", "txt_in.weight"]), "nearest is Flux.*`vector_in"),
        (saved(["a.weight"]), "no checkpoint of a known model"),
        (saved(["lora_unet_a.lora_up.weight"]), "is a LoRA"),
        (saved(["first_stage_model.decoder.conv_in.weight"]), "a VAE alone"),
        (with_average, "model_ema"),
        (in_fp8, "stored in torch.float8.*more-hf lora"),
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
    refused(more_hf.IncompatibleBaseError, "is a pickle", pickle)
    refused(more_hf.ExportError, "the original itself", target=file)
    refused(more_hf.ExportError, "should end in .safetensors", target=tmp_path / "out.ckpt")
    refused(more_hf.ExportError, "mean expert alone", router="random")
    refused(more_hf.ExportError, "cannot be told from the original's", strength=0.3)
    refused(more_hf.PrototypeError, "not loaded here", reach="denoiser")
    config = folder / "transformer" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"joint_attention_dim": 48', '"joint_attention_dim": 40'))
    refused(more_hf.IncompatibleBaseError, "(?s)does not fit.*size mismatch.*of the same size")
    config.write_text(text)
    index = folder / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace("FluxTransformer2DModel", "SD3Transformer2DModel"))
    refused(more_hf.IncompatibleBaseError, "has a FluxTransformer2DModel, which .* has not")
    index.write_text(text)
    with pytest.raises(more_hf.IncompatibleBaseError, match="Pass `text_encoder=`"):
        more_hf.erase_file(file, out, FORGET, remap_to=TARGET)
    more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder=folder)
    with pytest.raises(more_hf.AlreadyErasedError, match="was saved erased"):
        more_hf.erase_file(out, tmp_path / "b.safetensors", "cat", remap_to=TARGET, text_encoder=folder)


def test_weights_that_are_no_numbers(stored, tmp_path):
    folder, file = stored("flux")
    tensors = load_file(file)
    save_file({**tensors, "txt_in.weight": torch.full_like(tensors["txt_in.weight"], torch.nan)}, file)
    for write in (more_hf.erase_file, more_hf.erase_to_lora):
        with pytest.raises(more_hf.IncompatibleBaseError, match="not finite"):
            write(file, tmp_path / "out.safetensors", FORGET, remap_to=TARGET, text_encoder=folder)
    assert not (tmp_path / "out.safetensors").exists()


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


@pytest.mark.parametrize("scale", [None, 0.5])
def test_an_fp8_file_has_its_lora(stored, tmp_path, scale):
    folder, file = stored("flux")
    in_fp8(file)
    weight = load_file(file)["txt_in.weight"].double()
    if scale is not None:  # as some files store it, beside the weight
        save_file({**load_file(file), "txt_in.scale_weight": torch.tensor(scale)}, file)
        weight *= scale
    erasure = more_hf.erase_to_lora(
        file, tmp_path / "lora.safetensors", FORGET, remap_to=TARGET, text_encoder=folder
    )
    found = load_file(tmp_path / "lora.safetensors")
    up, down = (found[f"transformer.context_embedder.lora_{side}.weight"].double() for side in "BA")
    expected = erasure.remap.merged(weight.float()).double() - weight
    torch.testing.assert_close(up @ down, expected, rtol=1e-2, atol=1e-3)


def write_gguf(tensors, file, plain):
    """As city96's quantizer does: what a pattern matches stays as it is."""
    writer = gguf.GGUFWriter(file, "flux")
    writer.add_string("general.name", "tiny")
    for name, tensor in tensors.items():
        data, kind = tensor.numpy(), gguf.GGMLQuantizationType.Q8_0
        if tensor.ndim == 1 or data.shape[1] % 32 or re.search(plain, name):
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(families, stored, tmp_path, monkeypatch):
    any_size(monkeypatch, "flux")
    (folder, _), pipe = stored("flux"), families["flux"]
    file, out = tmp_path / "original.gguf", tmp_path / "erased.gguf"
    write_gguf(original_of(pipe, "flux"), file, "txt_in|vector_in")
    more_hf.erase_file(file, out, FORGET, remap_to=TARGET, text_encoder=folder)
    old, new = gguf.GGUFReader(file), gguf.GGUFReader(out)
    assert new.fields.keys() - old.fields.keys() == {"more_hf"}
    assert new.fields["general.name"].contents() == "tiny"
    assert {tensor.tensor_type.name for tensor in old.tensors} == {"F32", "Q8_0"}
    changed = [a.name for a, b in zip(old.tensors, new.tensors, strict=True) if (a.data != b.data).any()]
    assert changed == ["vector_in.in_layer.weight", "txt_in.weight"]
    assert more_hf.verify_file(out, text_encoder=folder)

    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    options = {"config": str(folder), "subfolder": "transformer", "quantization_config": config}
    read = FluxTransformer2DModel.from_single_file(str(out), torch_dtype=torch.float32, **options)
    pipe = type(pipe).from_pretrained(folder)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.bfloat16()
    erased = more_hf.erase_concept(pipe, FORGET, remap_to=TARGET)
    for site in more_hf.get_erasure(erased).sites:
        expected = erased.transformer.get_submodule(site).weight
        torch.testing.assert_close(read.get_submodule(site).weight.data, expected.data, rtol=0, atol=1e-5)


def test_a_gguf_file_with_quantized_layers_has_its_lora(families, stored, tmp_path):
    (folder, _), pipe = stored("flux"), families["flux"]
    file, lora = tmp_path / "original.gguf", tmp_path / "lora.safetensors"
    write_gguf(original_of(pipe, "flux"), file, "txt_in")
    options = {"remap_to": TARGET, "text_encoder": folder}
    with pytest.raises(more_hf.IncompatibleBaseError, match="stored in Q8_0.*more-hf lora"):
        more_hf.erase_file(file, tmp_path / "erased.gguf", FORGET, **options)
    assert not (tmp_path / "erased.gguf").exists()
    erasure = more_hf.erase_to_lora(file, lora, FORGET, dtype=torch.float32, **options)
    weight, found = pipe.transformer.time_text_embed.text_embedder.linear_1.weight.detach(), load_file(lora)
    up, down = (
        found[f"transformer.time_text_embed.text_embedder.linear_1.lora_{side}.weight"] for side in "BA"
    )
    expected = erasure.remaps["pooled"].merged(weight).float() - weight
    assert 0 < (up @ down - expected).norm() < 0.02 * expected.norm()  # rounded to 8 bits, but not 0
