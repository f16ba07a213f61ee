"""Somebody makes a timm model of their own forget a class, named as it is in their folders."""

import pytest
import timm
import torch
from PIL import Image
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

import more_hf
from more_hf.cli.main import main


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
