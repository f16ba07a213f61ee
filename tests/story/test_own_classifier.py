"""Somebody makes a classifier of their own forget a class, named as it is in their folders."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, ViTImageProcessor

import more_hf
from more_hf.cli.main import main


@pytest.fixture
def folders(digit_classifier, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digit_classifier.save_pretrained("classifier")
    ViTImageProcessor(do_resize=False, do_normalize=False).save_pretrained("classifier")
    for i, (image, label) in enumerate(zip(digits[0][:300, 0], digits[1][:300].tolist(), strict=True)):
        split = "train" if i < 250 else "test"
        folder = tmp_path / "images" / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image).round().byte().numpy()).save(folder / f"{i}.png")
    return tmp_path


@pytest.mark.slow
def test_a_class_is_forgotten_and_measured_on_other_images(folders, capsys):
    argv = ["erase-classes", "classifier", "--data", "images", "--test", "images", "--forget", "three"]
    assert main([*argv, "--output", "erased"]) == 0
    out, err = capsys.readouterr()
    assert "Reading 250 images in images (split 'train')" in err
    assert "Reading 50 images in images (split 'test')" in err
    assert "To rounding" in " ".join(out.split())
    table = out[out.index("Percent of the 50 images in images (split 'test') that are classified rightly") :]
    assert "three (forgotten)" in table
    assert more_hf.verify("erased")

    # The table goes along: into the record, and from there into the card.
    assert main(["push", "erased", "me/without-three", "--dry_run", "to_push"]) == 0
    card = Path("to_push/README.md").read_text()
    assert "![Which class the samples of each class are given, before and after](before_after.png)" in card
    for line in table.splitlines()[:14]:
        assert line in card


@pytest.mark.slow
def test_a_timm_model_forgets_a_class_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labels = ["tench", "goldfish", "hen"]
    model = timm.create_model("test_resnet", num_classes=3)
    config = TimmWrapperConfig(
        architecture="test_resnet",
        pretrained_cfg=model.pretrained_cfg,
        num_labels=3,
        id2label=dict(enumerate(labels)),
    )
    wrapper = TimmWrapperForImageClassification(config)
    wrapper.timm_model.load_state_dict(model.state_dict())
    wrapper.save_pretrained("timm-model")
    for i in range(12):
        folder = tmp_path / "images" / labels[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((160, 160), 20 + 60 * (i % 3)).convert("RGB").save(folder / f"{i}.png")

    argv = ["erase-classes", "--model", "timm-model", "--data", "images", "--output", "erased"]
    assert main([*argv, "--forget", "tensh"]) == 2
    assert "no class 'tensh'. Did you mean 'tench'" in capsys.readouterr().err
    assert main([*argv, "--forget", "hen", "--most_lost", "100"]) == 0
    assert more_hf.verify("erased")
    assert more_hf.get_erasure(more_hf.load("erased")).concepts == ["hen"]

    # In memory, the labels are in timm's own configuration.
    model.pretrained_cfg["label_names"] = labels
    images = [(torch.rand(12, 3, 160, 160), torch.arange(12) % 3)]
    more_hf.erase_classes(model, images, "hen", most_lost=100)
    assert more_hf.get_erasure(model).concepts == ["hen"]
