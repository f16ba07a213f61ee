"""Publishing: one commit of checked files, of every kind of model, and what is refused."""

import copy
import json
import logging
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from support.compare import same, state
from support.hub import BASE, REVISION, card_of, erase
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

import more_hf
from more_hf.cli.main import main


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DELTA = "more_hf_delta.safetensors"


def content(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# What goes up


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"variant": "fp16"}, id="variant", marks=pytest.mark.slow),
        pytest.param({"max_shard_size": "20KB"}, id="shards", marks=pytest.mark.slow),
    ],
)
def test_a_folder_goes_up_in_one_commit(tiny_sd, tmp_path, hub, options):
    pipe = erase(tiny_sd(), {"van gogh": ["vincent"]})
    folder = more_hf.save(pipe, tmp_path / "erased", **options)
    assert more_hf.push_to_hub(folder, "me/erased", private=True) == "the commit"

    assert hub.writes == [("create_repo", True), ("upload_folder", "Upload the model without van gogh")]
    files = hub.repos["me/erased"]["main"]
    assert set(files) == set(content(folder)) | {"README.md"}
    downloaded = hub.to_folder("me/erased", tmp_path / "downloaded_repo")
    assert more_hf.verify(downloaded).ok
    loaded = more_hf.load(downloaded)
    assert same(loaded.unet, pipe.unet.state_dict())
    assert more_hf.get_erasure(loaded).request == more_hf.get_erasure(pipe).request


@pytest.mark.slow
def test_a_pipeline_goes_up_as_its_folder_does(tiny_sd, tmp_path, hub):
    pipe = erase(tiny_sd())
    before = state(pipe.unet)
    more_hf.push_to_hub(more_hf.save(pipe, tmp_path / "erased"), "me/folder")
    more_hf.push_to_hub(pipe, "me/pipeline")
    folder, pushed = hub.repos["me/folder"]["main"], hub.repos["me/pipeline"]["main"]
    card = folder.pop("README.md").replace(b"me/folder", b"me/pipeline")
    assert card.replace(b"# folder", b"# pipeline") == pushed.pop("README.md")
    assert folder == pushed
    assert same(pipe.unet, before)


def test_record_has_the_base_and_its_revision(saved, hub):
    more_hf.push_to_hub(saved, "me/erased")
    facts = json.loads(hub.repos["me/erased"]["main"]["more_hf.json"])["facts"]
    assert (facts["base"], facts["base_revision"]) == (BASE, REVISION)


def test_base_revision_outlives_a_second_save(saved, tmp_path):
    pipe = more_hf.load(saved)
    erased = f"/cache/models--me--erased/snapshots/{'2' * 40}/unet"  # not the base's
    pipe.unet.register_to_config(_name_or_path=erased)
    again = more_hf.save(pipe, tmp_path / "again")
    assert json.loads((again / "more_hf.json").read_text())["facts"]["base_revision"] == REVISION


def test_no_path_of_this_machine_goes_up(tiny_sd, tmp_path, hub):
    base = tmp_path / "models" / "sd"
    tiny_sd().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n")
    pipe = more_hf.erase_concept(DiffusionPipeline.from_pretrained(base), "van gogh", remap_to="claude monet")
    record = (more_hf.save(pipe, tmp_path / "erased") / "more_hf.json").read_text()
    assert str(tmp_path) in record  # as long as it stays here

    more_hf.push_to_hub(pipe, "me/erased")
    assert not any(str(tmp_path).encode() in file for file in hub.repos["me/erased"]["main"].values())
    card = card_of(hub)
    assert (card.data.license, card.data.base_model) == ("mit", None)
    assert "mine" in card.data.tags
    assert "This is sd without **van gogh**" in card.text


def test_a_branch(saved, hub):
    card = b"---\nlicense: mit\n---\n# Mine\n"
    hub.repos["me/erased"] = {"main": {"README.md": card, "notes.txt": b"notes"}}
    more_hf.push_to_hub(saved, "me/erased", revision="no-van-gogh")
    assert hub.writes[1] == ("create_branch", "no-van-gogh")
    assert set(hub.repos["me/erased"]["main"]) == {"README.md", "notes.txt"}
    assert WEIGHTS in hub.repos["me/erased"]["no-van-gogh"]
    assert "# Mine" in card_of(hub, branch="no-van-gogh").text


@pytest.mark.parametrize("source", ["folder", "pipeline"])
def test_the_factors_stay_here_unless_asked_for(saved, tiny_sd, hub, source):
    model = saved if source == "folder" else erase(tiny_sd(), router="random")
    more_hf.push_to_hub(model, "me/without")
    assert DELTA not in hub.repos["me/without"]["main"]
    assert "`random` router, which picks one at run time, is not here" in card_of(hub, "me/without").text

    more_hf.push_to_hub(model, "me/with", include_delta=True)
    assert DELTA in hub.repos["me/with"]["main"]
    assert "with both, the original can be computed" in card_of(hub, "me/with").text
    assert "is put back by `more_hf.load`" in card_of(hub, "me/with").text


def test_dry_run_writes_what_would_be_pushed(saved, tmp_path, hub):
    (saved / ".cache").mkdir()
    (saved / ".cache" / "hidden.json").write_text("{}")
    grid = tmp_path / "grid.png"
    grid.write_bytes(b"a picture")
    folder = more_hf.push_to_hub(saved, "me/erased", dry_run=tmp_path / "new" / "to_push", grid=grid)
    assert hub.writes == []
    more_hf.push_to_hub(saved, "me/erased", grid=grid)
    written = content(folder)
    assert written == hub.repos["me/erased"]["main"]
    assert written["before_after.png"] == b"a picture"
    assert not [name for name in written if "cache" in name]
    with pytest.raises(more_hf.ExportError, match="not empty"):
        more_hf.push_to_hub(saved, "me/erased", dry_run=folder)
    (tmp_path / "empty").mkdir()
    assert more_hf.verify(more_hf.push_to_hub(saved, "me/erased", dry_run=tmp_path / "empty")).ok


# What is refused, with nothing pushed


def refused(hub, model, match, **kwargs):
    before = copy.deepcopy(hub.repos)
    with pytest.raises(more_hf.ExportError, match=match):
        more_hf.push_to_hub(model, "me/erased", **kwargs)
    assert hub.writes == []
    assert hub.repos == before


def test_nothing_erased(tiny_sd, hub):
    refused(hub, tiny_sd(), "Nothing was erased")


def test_a_folder_with_original_weights(saved, saved_once, hub):
    save_file(saved_once[1], saved / WEIGHTS)
    refused(hub, saved, "(?s)does not hold the erased model.*each sends p_f where p_t goes: no")


def test_a_pipeline_with_an_original_layer(tiny_sd, hub):
    pipe = erase(tiny_sd())
    erasure = more_hf.get_erasure(pipe)
    name, site = next(iter(erasure.sites.items()))
    site.write(erasure.originals[name])
    refused(hub, pipe, "not the erased model")


def test_weights_under_the_same_names_are_replaced_and_history_told(saved, hub, caplog):
    hub.repos["me/erased"] = {"main": {WEIGHTS: b"the original's"}}
    with caplog.at_level(logging.WARNING, logger="more_hf"):
        more_hf.push_to_hub(saved, "me/erased")
    assert "git history keeps old files" in caplog.text
    assert hub.repos["me/erased"]["main"][WEIGHTS] == (saved / WEIGHTS).read_bytes()
    caplog.clear()
    more_hf.push_to_hub(saved, "me/erased")  # what is replaced now was erased already
    assert "git history" not in caplog.text


def test_factors_that_are_not_there(saved, hub):
    (saved / DELTA).unlink()
    refused(hub, saved, f"has no {DELTA}", include_delta=True)


# The command


def test_the_command(saved, tmp_path, hub, capsys):
    assert main(["push", str(saved), "me/erased", "--private", "--revision", "erased"]) == 0
    assert "https://huggingface.co/me/erased" in capsys.readouterr().out
    assert hub.writes[:2] == [("create_repo", True), ("create_branch", "erased")]
    assert "more_hf.json" in hub.repos["me/erased"]["erased"]

    dry = f"push {saved} me/erased --dry_run {tmp_path / 'dry'} --no_card --include_delta"
    assert main(dry.split()) == 0
    assert str(tmp_path / "dry") in capsys.readouterr().out
    assert (tmp_path / "dry" / DELTA).is_file()
    assert not (tmp_path / "dry" / "README.md").exists()

    (saved / "original.ckpt").write_bytes(b"weights")
    assert main(["push", str(saved), "me/erased"]) == 2
    assert "original.ckpt" in capsys.readouterr().err


# Classifiers


@pytest.fixture
def classifier(digits, digit_classifier):
    model = copy.deepcopy(digit_classifier)
    pairs = zip(digits[0][:300], digits[1][:300], strict=True)
    rows = [{"pixel_values": image, "labels": label} for image, label in pairs]
    loader = DataLoader(rows, batch_size=100)
    return more_hf.erase_classes(model, loader, forget=["three"], remap_to=["eight"])


def test_a_classifier_goes_up(classifier, digits, tmp_path, hub, monkeypatch):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    folder = more_hf.save(classifier, tmp_path / "saved", processor=processor)
    more_hf.push_to_hub(folder, "me/digits")
    assert "preprocessor_config.json" in hub.repos["me/digits"]["main"]
    hub.to_folder("me/digits", tmp_path / "me" / "digits")
    assert more_hf.verify(tmp_path / "me" / "digits").ok
    card = card_of(hub, "me/digits")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert "without **three**" in card.text
    assert "The backbone is untouched" in card.text
    assert "three → eight" in card.text

    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names = {}
    exec(block, names)
    images, labels = digits
    with torch.no_grad():
        taken_for = names["model"](images[labels == 3]).logits.argmax(1)
        others = names["model"](images[labels == 5]).logits.argmax(1)
    assert (taken_for == 3).float().mean() < 0.1
    assert (others == 5).float().mean() > 0.8


def test_a_classifiers_folder_is_checked_too(classifier, digit_classifier, tmp_path, hub):
    folder = more_hf.save(classifier, tmp_path / "erased")
    digit_classifier.save_pretrained(folder)  # the original, under the same names
    refused(hub, folder, "does not hold the erased model")
