"""Somebody makes a classifier of their own forget a class, named as it is in their folders."""

import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

import more_hf
from more_hf.classification.names import class_names
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
    assert more_hf.verify("erased")


def test_a_timm_models_own_labels():
    model = torch.nn.Linear(2, 3)
    model.pretrained_cfg = {"label_names": ["tench", "goldfish", "hen"]}
    assert class_names(model, 3) == ("tench", "goldfish", "hen")
