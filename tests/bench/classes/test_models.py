import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from more_hf.data import CLASSIFIERS, load_classifier
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.models import MODELS, build_classifier, load_pretrained, pretrained_inputs
from more_hf_bench.classes.training import accuracy, predict
from more_hf_bench.errors import BenchmarkError


@pytest.fixture(scope="module")
def digits():
    return load_kd_data("digits")


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit-base"])
def test_save_and_load_give_the_same_logits(name, digits, tmp_path):
    model = build_classifier(name, digits).eval()
    pixels = digits.test[torch.arange(3)]["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
        assert logits.shape == (3, 10)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(pixel_values=pixels).logits, logits, rtol=0, atol=0)
        assert not loaded(pixel_values=pixels.flip(-1)).logits.equal(logits)
    assert loaded.config.id2label == dict(enumerate("0123456789"))
    assert loaded.config.label2id["7"] == 7


def test_the_seed_alone_decides_the_weights(digits):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    built = (build_classifier("allcnn-narrow", digits, seed=seed) for seed in (0, 0, 1))
    one, same, other = (model.state_dict() for model in built)
    assert torch.get_rng_state().equal(before)
    assert all(one[key].equal(same[key]) for key in one)
    assert not one["classifier.weight"].equal(other["classifier.weight"])
    assert not one["features.0.0.weight"].equal(other["features.0.0.weight"])


def test_allcnn_is_the_network_of_the_unlearning_literature(digits):
    """The same numbers from convolutions written out one by one."""
    model = build_classifier("allcnn", load_kd_data("digits", channels=3, image_size=32)).eval()
    weights = model.state_dict()
    assert [w.shape for key, w in weights.items() if w.ndim == 4] == [
        (48, 3, 3, 3),
        (48, 48, 3, 3),
        (96, 48, 3, 3),
        *[(96, 96, 3, 3)] * 4,
        (96, 96, 1, 1),
    ]
    x = pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sizes = []
    for i, stride in enumerate([1, 1, 2, 1, 1, 2, 1, 1]):
        kernel = weights[f"features.{i}.0.weight"]
        x = nn.functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        x = (x / (1 + 1e-5) ** 0.5).relu()  # fresh statistics: mean 0, variance 1
        sizes.append(x.shape[-1])
    logits = x.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert sizes == [32, 32, 16, 16, 16, 8, 8, 8]
    with torch.no_grad():
        output = model(pixel_values=pixels, labels=torch.tensor([1, 2]))
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        output.loss, nn.functional.cross_entropy(logits, torch.tensor([1, 2])), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_resnet18_sizes(digits):
    """11,220,132 parameters with 100 classes; with the small stem the last map is 4×4 at 32 pixels."""
    data = load_kd_data("digits", channels=3, image_size=32)
    model = build_classifier("resnet18", data).eval()
    assert count(model) - count(model.classifier) == 11_220_132 - (512 * 100 + 100)
    with torch.no_grad():
        assert model.resnet(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 512, 4, 4)
        shape = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2] * 4}
        plain = ResNetForImageClassification(ResNetConfig(**shape, layer_type="basic")).eval()
        assert plain.resnet(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 512, 1, 1)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_packaged_classifiers_load(name):
    model = load_classifier(name)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(("name", "least"), [("digits-allcnn", 97.0), ("digits-vit", 96.0)])
def test_digits_classifiers_are_as_good_as_said(name, least, digits):
    model = load_classifier(name)
    predicted = predict(model, digits.test)
    assert accuracy(predicted, digits.test.labels) >= least
    assert accuracy(predicted.roll(1), digits.test.labels) < 30
    nn.init.zeros_(model.classifier.weight)
    assert accuracy(predict(model, digits.test), digits.test.labels) < 30


def test_no_such_classifier(digits):
    with pytest.raises(ValueError, match="no classifier 'mnist'.*digits-vit"):
        load_classifier("mnist")
    with pytest.raises(BenchmarkError, match="no classifier 'resnet50'.*allcnn-narrow"):
        build_classifier("resnet50", digits)


@pytest.fixture(scope="module")
def imagenet_resnet(tmp_path_factory):
    """A tiny ResNet with its 7×7 first convolution, five labels and an image processor, saved."""
    folder = tmp_path_factory.mktemp("resnet")
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = ResNetForImageClassification(config)
    model.save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": 24, "width": 24}, image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3]
    ).save_pretrained(folder)
    return folder, model


def test_a_pretrained_classifier_keeps_all_but_its_head(imagenet_resnet):
    folder, original = imagenet_resnet
    inputs = pretrained_inputs(str(folder))
    assert inputs == {"image_size": 24, "channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    data = load_kd_data("digits", **inputs)
    model = load_pretrained(str(folder), data)
    assert model.training
    assert model.config.id2label[3] == "3"
    for key, tensor in model.state_dict().items():
        assert tensor.equal(original.state_dict()[key]) == (not key.startswith("classifier.1"))
    with torch.no_grad():
        assert model.eval()(**data.test[torch.arange(2)]).logits.shape == (2, 10)


def test_a_first_convolution_that_does_not_fit(imagenet_resnet, digits):
    with pytest.raises(BenchmarkError, match="reads 3 channels, the images of digits have 1"):
        load_pretrained(str(imagenet_resnet[0]), digits)


def test_weights_that_do_not_fit(imagenet_resnet, tmp_path):
    """A configuration that asks for another first convolution than the file has."""
    folder, original = imagenet_resnet
    original.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"embedding_size": 8', '"embedding_size": 16'))
    data = load_kd_data("digits", **pretrained_inputs(str(folder)))
    with pytest.raises(BenchmarkError, match="no weights that fit 'resnet.embedder"):
        load_pretrained(str(tmp_path), data)
