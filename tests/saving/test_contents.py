"""What may be in a saved folder, and what may go up: a list of what is allowed, whatever else is there."""

import os
import shutil

import pytest
from support.hub import erase

import more_hf


FOREIGN = [
    "unet/diffusion_pytorch_model.bak",
    "unet/diffusion_pytorch_model.SAFETENSORS",
    "unet/diffusion_pytorch_model.Bin",
    "unet/diffusion_pytorch_model.sft",
    "unet/model.safetensors",  # the name of a text encoder's
    "unet/diffusion_pytorch_model.safetensors.index.json",  # shards besides a single file
    "scheduler/diffusion_pytorch_model.safetensors",  # a class without weights
    "text_encoder/model.fp16.safetensors",
    "other/diffusion_pytorch_model.safetensors",  # no component
    "weights.zip",
    "weights.npz",
    "weights.npy",
    "weights.pkl",
    "weights.pickle",
    "weights.tar",
    "weights.pth.tar",
    "weights.onnx_data",
    "weights.ptl",
    "weights.keras",
    "weights.mar",
    "weights",
    "vae/more_hf_delta.safetensors",
]


def put(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"weights of the original")


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_neither_go_up_nor_pass_nor_stay(saved, hub, name):
    put(saved, name)
    verification = more_hf.verify(saved)
    assert not verification
    assert name.split("/")[-1] in str(verification)
    with pytest.raises(more_hf.ExportError, match="no part of the saved model"):
        more_hf.push_to_hub(saved, "me/erased", api=hub)
    assert hub.writes == []


@pytest.mark.slow
def test_save_refuses_what_it_neither_replaces_nor_may_keep(tiny_sd, saved):
    pipe = erase(tiny_sd())
    (saved / "more_hf_delta.safetensors").unlink()
    for name in FOREIGN:
        put(saved, name)
        with pytest.raises(more_hf.ExportError, match=name.split("/")[-1]):
            more_hf.save(pipe, saved)
        (saved / name).unlink()
    assert more_hf.verify(more_hf.save(pipe, saved))


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
    assert bool(more_hf.verify(saved)) == (
        kind == "file"
    )  # as in the Hub's cache, where every file is a link
    with pytest.raises(more_hf.ExportError, match="links"):
        more_hf.push_to_hub(saved, "me/erased", api=hub)
    assert hub.writes == []


def test_texts_and_pictures_may_lie_there_and_only_what_the_card_names_goes_up(saved, hub):
    (saved / "README.md").write_text("---\nlicense: mit\n---\n![a cat](images/cat.PNG)\n")
    (saved / "images").mkdir()
    for name in ("images/cat.PNG", "images/dog.png", "notes.txt", "LICENSE", ".gitattributes"):
        (saved / name).write_bytes(b"mine")
    (saved / ".git").mkdir()
    (saved / ".git" / "index").write_bytes(b"git's")
    assert more_hf.verify(saved)
    more_hf.push_to_hub(saved, "me/erased", api=hub)
    pushed = set(hub.repos["me/erased"]["main"])
    assert {"README.md", "images/cat.PNG"} <= pushed
    assert pushed.isdisjoint({"images/dog.png", "notes.txt", "LICENSE", ".gitattributes", ".git/index"})


@pytest.mark.slow
def test_a_repository_with_weights_under_any_name_is_refused(saved, hub):
    for name in FOREIGN:
        hub.repos["me/erased"] = {"main": {name: b"weights", "README.md": b"---\nlicense: mit\n---\n"}}
        with pytest.raises(more_hf.ExportError, match="delete_files"):
            more_hf.push_to_hub(saved, "me/erased", api=hub)
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
    text = index.read_text("utf-8").replace(
        "diffusion_pytorch_model-", f"../../{outside.name}/diffusion_pytorch_model-"
    )
    index.write_text(text, "utf-8")
    assert not more_hf.verify(folder)
    with pytest.raises(more_hf.IncompatibleBaseError):
        more_hf.load(folder)


def test_licence_file_keeps_lying_there(saved, tiny_sd):
    (saved / "more_hf_delta.safetensors").unlink()
    (saved / "LICENSE").write_text("terms")
    assert (more_hf.save(erase(tiny_sd()), saved) / "LICENSE").read_text() == "terms"
