"""A pretrained classifier is fine-tuned as its architecture is, and a trained one is taken as it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from more_hf.data import FOLDER
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.features import cache, mapped
from more_hf_bench.classes.models import build_classifier, load_pretrained
from more_hf_bench.classes.training import FINE_TUNING, Recipe, accuracy, predict, train_classifier


VIT = str(FOLDER / "classifiers" / "digits-vit")


@pytest.fixture(scope="module")
def digits():
    return load_kd_data("digits")


@pytest.fixture(scope="module")
def letters(digits):
    """Digits whose classes have other names: data that no classifier at hand was trained for."""
    return replace(digits, class_names=tuple("abcdefghij"))


def test_the_recipe_is_that_of_the_architecture(letters, tmp_path):
    assert Recipe.of(letters, VIT) == replace(FINE_TUNING["vit"], flip=False)
    assert Recipe.of(letters, VIT, learning_rate=0.5).learning_rate == 0.5
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    assert Recipe.of(letters, str(tmp_path)) == replace(FINE_TUNING["resnet"], flip=False)
    # from random weights the data set decides
    assert Recipe.of(letters, "vit-narrow").learning_rate == Recipe.of(letters).learning_rate == 2e-3


def test_a_classifier_of_the_data_set_is_taken_as_it_is(digits, tmp_path):
    recipe = Recipe.of(digits, VIT)
    assert recipe.epochs == 0
    model = train_classifier(load_pretrained(VIT, digits), digits.train, recipe, output=tmp_path)
    original = AutoModelForImageClassification.from_pretrained(VIT)
    for one, other in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(one.cpu(), other.float())
    assert Recipe.of(digits, VIT, epochs=2).epochs == 2


@pytest.mark.slow
def test_a_fine_tuned_vit_keeps_what_it_knows(digits, tmp_path):
    """The recipe of a training from random weights makes it forget; the packaged ViT knows 97 %."""
    recipe = replace(FINE_TUNING["vit"], flip=False, epochs=1)

    def tuned(recipe, name):
        model = load_pretrained(VIT, digits)
        model = train_classifier(model, digits.train, recipe, output=tmp_path / name)
        return accuracy(predict(model, digits.test), digits.test.labels)

    known = accuracy(predict(load_pretrained(VIT, digits), digits.test), digits.test.labels)
    assert tuned(recipe, "tuned") > known - 1
    rate = 0.02  # ten times that of a narrow network from random weights, as 2e-3 is for one of width 768
    assert tuned(replace(recipe, learning_rate=rate, warmup_steps=1), "destroyed") < known - 10


def test_processes_decode_the_same_images(tmp_path):
    noise = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                pixels = noise.integers(0, 256, (9, 11, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    alone, decoded = (load_kd_data(str(tmp_path), image_size=8, workers=count) for count in (0, 2))
    assert decoded.train.workers == 2
    for one, other in zip(alone.train.loader(4), decoded.train.loader(4), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["labels"], other["labels"])
    # what is in memory is not decoded
    assert load_kd_data("digits", workers=2).train.workers == 0


def test_features_are_collected_once_into_a_file(digits, tmp_path, monkeypatch):
    model = build_classifier("allcnn-narrow", digits).eval()
    parts = {"test": digits.test}
    head = model.classifier
    plain = cache(model, head, parts)
    on_disk = cache(model, head, parts, folder=tmp_path)
    assert torch.equal(on_disk.inputs["test"], plain.inputs["test"])
    assert torch.equal(mapped(tmp_path / "features-test.npy"), plain.inputs["test"])
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("asked again"))
    assert torch.equal(cache(model, head, parts, folder=tmp_path).logits("test"), plain.logits("test"))
