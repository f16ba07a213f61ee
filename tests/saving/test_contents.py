"""What goes up is what `save` wrote; what else is in the folder stays behind, and must not be weights."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
from support.hub import erase

import more_hf


LOADABLE = [
    "unet/diffusion_pytorch_model.SAFETENSORS",
    "unet/diffusion_pytorch_model.Bin",
    "unet/diffusion_pytorch_model.sft",
    "unet/model.safetensors",  # the name of a text encoder's
    "unet/diffusion_pytorch_model.safetensors.index.json",  # shards besides a single file
    "scheduler/diffusion_pytorch_model.safetensors",  # a class without weights
    "text_encoder/model.fp16.safetensors",
    "other/diffusion_pytorch_model.safetensors",  # no component
    "flax_model.msgpack",
    "model.onnx",
    "model-Q4_K.gguf",
    "tf_model.h5",
    "pytorch_model.bin.index.json",
    "weights.pth.tar",
    "weights.pkl",
    "v1-5-pruned.ckpt",
    "lora/pytorch_lora_weights.safetensors",
    "old/unet/diffusion_pytorch_model.safetensors",
    "vae/more_hf_delta.safetensors",
]
# What no loader reads as weights may be there, and stays behind.
ASIDE = ["weights.bak", "weights.zip", "weights", "unet/notes.json", "LICENSE", ".gitattributes", "dog.png"]
# What the next release of transformers may write next to what it writes today.
NEWER = {"tokenizer/foo_template.jinja": "{{ x }}", "video_preprocessor_config.json": "{}"}


def put(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"weights of the original")


@pytest.mark.parametrize("name", LOADABLE)
def test_other_weights_neither_go_up_nor_pass_nor_stay(saved, hub, name):
    put(saved, name)
    verification = more_hf.verify(saved)
    assert not verification
    assert name.split("/")[-1] in str(verification)
    with pytest.raises(more_hf.ExportError, match="no part of the saved model"):
        more_hf.push_to_hub(saved, "me/erased")
    assert hub.writes == []


@pytest.mark.slow
def test_save_refuses_what_it_neither_replaces_nor_may_keep(tiny_sd, saved, tmp_path):
    pipe, without_record = erase(tiny_sd()), tmp_path / "folder"
    (saved / "more_hf_delta.safetensors").unlink()
    for folder in (saved, without_record):
        for name in LOADABLE:
            put(folder, name)
            before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
            with pytest.raises(more_hf.ExportError, match=name.split("/")[-1]):
                more_hf.save(pipe, folder)
            assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
            (folder / name).unlink()
        assert more_hf.verify(more_hf.save(pipe, folder))


@pytest.mark.parametrize("kind", ["file", "folder", "component"])
def test_links_do_not_go_up(saved, tmp_path, hub, kind):
    outside = tmp_path / "outside"
    if kind == "file":
        shutil.move(saved / "unet" / "config.json", outside)
        os.symlink(outside, saved / "unet" / "config.json")
    elif kind == "folder":
        outside.mkdir()
        os.symlink(outside, saved / "notes.md")
    else:
        shutil.move(saved / "unet", outside)
        os.symlink(outside, saved / "unet")
    # in the Hub's cache every file is a link
    assert bool(more_hf.verify(saved)) == (kind == "file")
    with pytest.raises(more_hf.ExportError, match="replace links"):
        more_hf.push_to_hub(saved, "me/erased")
    assert hub.writes == []


def test_only_what_save_wrote_and_what_the_card_names_goes_up(saved, hub, caplog):
    (saved / "README.md").write_text("---\nlicense: mit\n---\n![a cat](images/cat.PNG)\n")
    (saved / "images").mkdir()
    for name in ("images/cat.PNG", *ASIDE):
        put(saved, name)
    (saved / ".git").mkdir()
    (saved / ".git" / "index").write_bytes(b"git's")
    assert more_hf.verify(saved)
    with caplog.at_level(logging.WARNING, logger="more_hf"):
        more_hf.push_to_hub(saved, "me/erased")
    expected = {*json.loads((saved / "more_hf.json").read_text())["files"], "more_hf.json"}
    expected.remove("more_hf_delta.safetensors")
    assert set(hub.repos["me/erased"]["main"]) == expected | {"README.md", "images/cat.PNG"}
    assert "images/cat.PNG" not in caplog.text
    for name in (*ASIDE, ".git"):
        assert name in caplog.text


def test_files_of_a_newer_transformers(tiny_sd, tmp_path, hub, monkeypatch):
    pipe = erase(tiny_sd())
    write = type(pipe.tokenizer).save_pretrained

    def save_pretrained(self, folder, **options):
        write(self, folder, **options)
        for name, text in NEWER.items():
            Path(folder).parent.joinpath(name).write_text(text)

    monkeypatch.setattr(type(pipe.tokenizer), "save_pretrained", save_pretrained)
    folder = more_hf.save(pipe, tmp_path / "erased")
    assert more_hf.verify(folder)
    more_hf.push_to_hub(folder, "me/erased")
    pushed = hub.repos["me/erased"]["main"]
    assert {name: pushed[name].decode() for name in NEWER} == NEWER
    assert more_hf.verify(hub.to_folder("me/erased", tmp_path / "downloaded_repo"))

    (folder / "tokenizer" / "foo_template.jinja").write_text("{{ y }}")
    verification = more_hf.verify(folder)
    assert not verification
    assert "tokenizer/foo_template.jinja" in verification.failures
    with pytest.raises(more_hf.ExportError, match="every file"):
        more_hf.push_to_hub(folder, "me/erased")


@pytest.mark.slow
@pytest.mark.parametrize("branch", [None, "new"])
def test_a_repository_with_weights_under_any_name_is_refused(saved, hub, branch):
    message = ".*delete_files.*git history keeps old files"
    for name in LOADABLE:
        hub.repos["me/erased"] = {"main": {name: b"weights", "README.md": b"---\nlicense: mit\n---\n"}}
        with pytest.raises(more_hf.ExportError, match=re.escape(name) + message):
            more_hf.push_to_hub(saved, "me/erased", revision=branch)
    assert hub.writes == []


def test_both_a_single_file_and_shards(saved, tiny_sd, tmp_path):
    """Which of them is read depends on the library, so that neither counts."""
    sharded = more_hf.save(erase(tiny_sd()), tmp_path / "sharded", max_shard_size="20KB")
    for path in (sharded / "unet").glob("diffusion_pytorch_model*"):
        shutil.copy(path, saved / "unet")
    assert not more_hf.verify(saved)
    with pytest.raises(more_hf.IncompatibleBaseError):
        more_hf.load(saved)


def test_an_index_that_leads_elsewhere(tiny_sd, tmp_path):
    folder = more_hf.save(erase(tiny_sd()), tmp_path / "sharded", max_shard_size="20KB")
    outside = shutil.copytree(folder / "unet", tmp_path / "outside")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    name = "diffusion_pytorch_model-"
    index.write_text(index.read_text("utf-8").replace(name, f"../../{outside.name}/{name}"), "utf-8")
    assert not more_hf.verify(folder)
    with pytest.raises(more_hf.IncompatibleBaseError):
        more_hf.load(folder)


def test_licence_file_keeps_lying_there(saved, tiny_sd):
    (saved / "more_hf_delta.safetensors").unlink()
    (saved / "LICENSE").write_text("terms")
    assert (more_hf.save(erase(tiny_sd()), saved) / "LICENSE").read_text() == "terms"
