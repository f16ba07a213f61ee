"""Odd arguments, full disks and adapters: refused with our errors before anything is written."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from support.hub import erase

import more_hf


@pytest.fixture(scope="module")
def erased():
    from support.pipelines import build_tiny_sd

    return erase(build_tiny_sd())


@pytest.mark.parametrize("path", [5, None, "null\0byte", "x" * 5000], ids=lambda path: repr(path)[:6])
def test_paths(erased, tmp_path, monkeypatch, path):
    """What Python says is enough, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    said = (more_hf.MoreError, OSError, ValueError, TypeError)
    for write in (more_hf.save, more_hf.save_lora, more_hf.save_checkpoint):
        with pytest.raises(said):
            write(erased, path)
    for read in (more_hf.load, more_hf.verify):
        with pytest.raises(said):
            read(path)
    if path is not None:
        with pytest.raises(said):
            more_hf.push_to_hub(erased, "me/erased", dry_run=path)
        with pytest.raises(said):
            more_hf.push_to_hub(erased, "me/erased", grid=path, dry_run=tmp_path / "dry")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["", "x.y", "../x", 5])
def test_variants_that_verify_could_not_read(erased, tmp_path, variant):
    with pytest.raises(more_hf.ExportError, match="variant"):
        more_hf.save(erased, tmp_path / "erased", variant=variant)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("repo_id", "options"),
    [
        ("name", {}),
        ('me/x")\nimport os', {}),
        ("me/erased", {"grid": "no-such-file.png"}),
        ("me/erased", {"grid": __file__}),
    ],
)
def test_arguments_of_a_push(erased, hub, repo_id, options):
    with pytest.raises(more_hf.ExportError):
        more_hf.push_to_hub(erased, repo_id, **options)
    assert hub.writes == []


@pytest.mark.parametrize("model", [None, 5, "text", torch.nn.Linear(2, 2)])
def test_models(tmp_path, model):
    for write in (more_hf.save, more_hf.save_lora, more_hf.save_checkpoint):
        with pytest.raises(more_hf.MoreError):
            write(model, tmp_path / "erased.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk(erased, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(more_hf.ExportError, match="No space left"):
        more_hf.save(erased, tmp_path / "erased")
    monkeypatch.setattr(Path, "write_bytes", full)
    for write in (more_hf.save_lora, more_hf.save_checkpoint):
        with pytest.raises(more_hf.ExportError, match="No space left"):
            write(erased, tmp_path / "file.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_an_adapter_on_layers_that_were_not_edited(tiny_sd, tmp_path, hub, component):
    """Its names are not the class's: `from_pretrained` would fill the layers under it with random numbers."""
    pipe = erase(tiny_sd())
    target = {"unet": "attn1.to_q", "text_encoder": "q_proj"}[component]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[target]), getattr(pipe, component))
    with pytest.raises(more_hf.ExportError, match="base_layer"):
        more_hf.save(pipe, tmp_path / "erased")
    with pytest.raises(more_hf.ExportError, match="base_layer"):
        more_hf.push_to_hub(pipe, "me/erased")
    assert not (tmp_path / "erased").exists()
    assert hub.writes == []
