"""How `erase` and `lora` load a pipeline: dtype, device, offloading, and refusals before a weight is read."""

import json
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from support.families import FORGET, TARGET, build, denoiser_of
from support.pipelines import build_tiny_sd

import more_hf
from more_hf.cli import checkpoint
from more_hf.cli.checkpoint import Checkpoint, find_device, load_pipeline, read_checkpoint, stored_dtype
from more_hf.cli.main import main
from more_hf.core.errors import SiteNotFoundError


pytestmark = pytest.mark.usefixtures("short_prompts")
CPU = torch.device("cpu")
WORDS = ["--concept", FORGET, "--remap_to", TARGET, "--output"]


@pytest.fixture
def stored(tmp_path):
    """A factory: the folder of a tiny pipeline of a family, stored in a dtype."""

    def store(family, dtype):
        folder = tmp_path / f"{family}-{dtype}"
        build(family).to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return store


@pytest.fixture
def loaded(monkeypatch):
    """What `from_pretrained` returned, in order."""
    pipes, load = [], DiffusionPipeline.from_pretrained.__func__

    def record(cls, *args, **options):
        pipes.append(load(cls, *args, **options))
        return pipes[-1]

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(record))
    return pipes


def index_of(folder, pipeline, **parts):
    """A folder with an index and without a weight."""
    folder.mkdir()
    entries = {name: ["diffusers", cls] for name, cls in parts.items()}
    index = {"_class_name": pipeline, "vae": [None, None], **entries}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def refusal(capsys, *argv):
    assert main([str(argument) for argument in argv]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("flux", "bfloat16"), ("sdxl", "float16"), ("sd3", "float32")])
def test_a_pipeline_stays_in_the_dtype_that_it_is_stored_in(stored, tmp_path, family, dtype):
    folder, output = stored(family, dtype), tmp_path / "erased"
    assert main(["erase", str(folder), *WORDS, str(output)]) == 0
    denoiser = "unet" if family == "sdxl" else "transformer"
    assert stored_dtype(output / denoiser) == dtype
    text = load_file(output / "text_encoder/model.safetensors").values()
    assert {str(value.dtype) for value in text} == {f"torch.{dtype}"}
    assert main(["verify", str(output)]) == 0


@pytest.mark.slow
def test_dtype_converts(stored, tmp_path):
    output = tmp_path / "erased"
    assert main(["erase", str(stored("flux", "bfloat16")), *WORDS, str(output), "--dtype", "float32"]) == 0
    assert stored_dtype(output / "transformer") == "float32"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("flux", "bfloat16"), ("sdxl", "float16")])
def test_a_lora_is_made_in_the_dtype_of_the_model_and_without_its_vae(
    stored, loaded, tmp_path, family, dtype
):
    folder, output = stored(family, dtype), tmp_path / "lora.safetensors"
    assert main(["lora", str(folder), *WORDS, str(output)]) == 0
    (pipe,) = loaded
    assert pipe.vae is None
    assert denoiser_of(pipe).dtype == getattr(torch, dtype)

    original = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    original.load_lora_weights(output)
    original.fuse_lora()
    original.unload_lora_weights()
    wanted = denoiser_of(pipe).state_dict()
    for name in more_hf.get_erasure(pipe).sites:
        weight = denoiser_of(original).state_dict()[f"{name}.weight"]
        torch.testing.assert_close(weight, wanted[f"{name}.weight"].float(), rtol=0.02, atol=0.01)


@pytest.mark.slow
def test_a_kohya_file_has_the_size_of_pictures(loaded, tmp_path):
    build_tiny_sd().save_pretrained(tmp_path / "sd")
    output = tmp_path / "loras"
    assert main(["lora", str(tmp_path / "sd"), *WORDS, str(output), "--format", "kohya"]) == 0
    assert loaded[0].vae is not None
    assert loaded[0].safety_checker is None


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_offloaded_is_the_same(stored, tmp_path, monkeypatch, family, offload):
    folder = stored(family, "float32")
    assert main(["erase", str(folder), *WORDS, str(tmp_path / "plain")]) == 0
    # The CPU in place of a device: the same hooks move the same weights. accelerate's of single layers fail
    # there for text encoders, so that only the denoiser's are tried.
    monkeypatch.setattr(checkpoint, "find_device", lambda name, offload: CPU)

    def offload_denoiser(pipe, device):
        cpu_offload(denoiser_of(pipe), device)

    monkeypatch.setattr(DiffusionPipeline, "enable_sequential_cpu_offload", offload_denoiser)
    assert main(["erase", str(folder), *WORDS, str(tmp_path / "out"), "--offload", offload]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    for file in (tmp_path / "plain").rglob("*.safetensors"):
        wanted, found = load_file(file), load_file(tmp_path / "out" / file.relative_to(tmp_path / "plain"))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_offloading_is_of_the_device_that_was_asked_for(monkeypatch):
    calls = []

    class Pipe:
        enable_model_cpu_offload = enable_sequential_cpu_offload = lambda self, device: calls.append(device)
        to = lambda self, device, **options: calls.append(device)  # noqa: E731

    monkeypatch.setattr(more_hf, "load_emoji_sd", lambda dtype: Pipe(), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    emoji = read_checkpoint("emoji-sd")
    for device in (None, "cuda:1", "cpu"):
        load_pipeline(emoji, device=device)
    for offload in ("model", "sequential"):
        load_pipeline(emoji, device="cuda:1", offload=offload)
    assert [str(device) for device in calls] == ["cuda", "cuda:1", "cpu", "cuda:1", "cuda:1"]


def test_devices_that_are_not_here():
    wrong = (("gpu", "none", "no device 'gpu'"), ("cuda:99", "none", "no device 'cuda:99' here"))
    for device, offload, message in (*wrong, ("cpu", "model", "the device is the CPU")):
        with pytest.raises(ValueError, match=message):
            find_device(device, offload)
    assert find_device("cpu", "none") == torch.device("cpu")


def test_stored_dtype_is_that_of_the_weights_that_are_loaded(tmp_path):
    name = "diffusion_pytorch_model"
    assert stored_dtype(tmp_path) == "float32"
    save_file({"a": torch.zeros(9).bfloat16()}, tmp_path / "lora.safetensors")
    assert stored_dtype(tmp_path) == "float32"
    save_file({"a": torch.zeros(9).half()}, tmp_path / f"{name}.fp16.safetensors")
    assert stored_dtype(tmp_path) == "float16"  # there is no other
    shard = tmp_path / f"{name}-00001-of-00002.safetensors"
    save_file({"a": torch.zeros(9).bfloat16(), "b": torch.zeros(8)}, shard)
    assert stored_dtype(tmp_path) == "bfloat16"
    save_file({"c": torch.zeros(9).half()}, tmp_path / f"{name}-00002-of-00002.safetensors")
    save_file({"a": torch.zeros(9).to(torch.float8_e4m3fn)}, shard)
    (tmp_path / f"{name}-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="F8_E4M3"):
        stored_dtype(tmp_path)


def test_a_hub_id_keeps_its_name(stored, monkeypatch):
    folder, seen = stored("flux", "float16"), {}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda model, name: str(folder / name))
    monkeypatch.setattr(DiffusionPipeline, "download", lambda model, **options: str(folder))

    def from_pretrained(model, **options):
        seen.update(model=model, **options)
        return SimpleNamespace(to=lambda *args, **options: None)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    load_pipeline(read_checkpoint("me/flux"), without=("vae", "safety_checker"), device="cpu")
    assert seen == {"model": "me/flux", "dtype": torch.float16, "vae": None}


def test_refused_before_a_weight_is_read(tmp_path, capsys):
    flux = index_of(tmp_path / "flux", "FluxPipeline", transformer="FluxTransformer2DModel")
    pixart = index_of(tmp_path / "pixart", "PixArtSigmaPipeline", transformer="PixArtTransformer2DModel")
    video = index_of(tmp_path / "video", "LTXPipeline", transformer="LTXVideoTransformer3DModel")
    out = tmp_path / "out"

    assert "loads no LoRA into a PixArtSigmaPipeline" in refusal(capsys, "lora", pixart, *WORDS, out)
    assert "would be a pickle" in refusal(capsys, "lora", flux, *WORDS, tmp_path / "lora.pt")
    unknown = refusal(capsys, "erase", video, *WORDS, out)
    assert "LTXPipeline is not supported yet" in unknown
    assert "transformer: LTXVideoTransformer3DModel" in unknown
    assert "both" in refusal(capsys, "erase", flux, "--concept", "a", "--remap_to", "a", "--output", out)
    assert not out.exists()

    with pytest.raises(SiteNotFoundError, match="not supported"):
        load_pipeline(Checkpoint("video", "LTXPipeline", {"transformer": "LTXVideoTransformer3DModel"}))


def test_refused_before_anything_heavy(tmp_path):
    index_of(tmp_path / "flux", "FluxPipeline", transformer="FluxTransformer2DModel")
    (tmp_path / "empty").mkdir()
    code = (
        "import sys; from more_hf.cli.main import main; status = main(sys.argv[1:]); "
        "sys.exit(3 if {'torch', 'diffusers'} & set(sys.modules) else status)"
    )

    def refused(*argv):
        words = [*argv, "--concept", "a", "--remap_to", "none", "--output", "out"]
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "FluxTransformer2DModel" in refused("lora", "./flux", "--format", "kohya")
    assert "no model_index.json" in refused("erase", "./empty")
