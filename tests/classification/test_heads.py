"""The head is found by running the model, whatever it is called, in tiny models of the real classes."""

import subprocess
import sys

import pytest
import timm
import torch
import transformers
from support.compare import same, state
from torch import nn

import more_hf
from more_hf.classification.heads import example_pixels, find_heads
from more_hf.core.errors import SiteNotFoundError


def tiny(name, **sizes):
    """A factory of a classifier of transformers with random weights."""
    model, config = (getattr(transformers, name + kind) for kind in ("ForImageClassification", "Config"))
    return lambda: model(config(**sizes))


def of_timm(name, **sizes):
    return lambda: timm.create_model(name, num_classes=7, **sizes)


# Width and number of labels are both 8 in some: a layer inside that has the head's shape must not be taken
# for it.
TOKENS = {"image_size": 32, "patch_size": 16, "hidden_size": 8, "num_hidden_layers": 1}
TOKENS |= {"num_attention_heads": 2, "intermediate_size": 16, "num_labels": 8}
EFFICIENT = {"image_size": 32, "width_coefficient": 0.25, "hidden_dim": 320, "kernel_sizes": [3]}
EFFICIENT |= {"in_channels": [32], "out_channels": [16], "strides": [2], "num_block_repeats": [1]}
EFFICIENT |= {"expand_ratios": [1], "depthwise_padding": [], "num_labels": 4}
SWIN = {
    "image_size": 32,
    "embed_dim": 4,
    "depths": [1, 1],
    "num_heads": [1, 1],
    "window_size": 4,
    "num_labels": 3,
}
TWO_STAGES = {"hidden_sizes": [4, 8], "depths": [1, 1]}
RESNET = {**TWO_STAGES, "embedding_size": 4, "layer_type": "basic", "num_labels": 5}
V2 = {"layers": [1] * 4, "channels": [8] * 4, "stem_chs": 8}
DISTILLED = {"img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 2}
DEIT_TEACHER = transformers.DeiTForImageClassificationWithTeacher
MODELS = {
    "vit": (tiny("ViT", **TOKENS), ["classifier"]),
    "deit": (tiny("DeiT", **TOKENS), ["classifier"]),
    "deit with teacher": (
        lambda: DEIT_TEACHER(transformers.DeiTConfig(**TOKENS)),
        ["cls_classifier", "distillation_classifier"],
    ),
    "beit": (tiny("Beit", **TOKENS), ["classifier"]),
    "dinov2": (tiny("Dinov2", **TOKENS), ["classifier"]),
    "swin": (tiny("Swin", **SWIN), ["classifier"]),
    "convnext": (tiny("ConvNext", image_size=32, num_stages=2, **TWO_STAGES), ["classifier"]),
    "resnet": (tiny("ResNet", **RESNET), ["classifier.1"]),
    "efficientnet": (tiny("EfficientNet", **EFFICIENT), ["classifier"]),
    "mobilenet v1": (tiny("MobileNetV1", image_size=32, depth_multiplier=0.25, min_depth=4), ["classifier"]),
    "mobilenet v2": (tiny("MobileNetV2", image_size=32, depth_multiplier=0.1, min_depth=4), ["classifier"]),
    "timm wrapper": (tiny("TimmWrapper", architecture="test_vit", num_labels=3), ["timm_model.head"]),
    "timm vit": (of_timm("test_vit"), ["head"]),
    "timm resnet": (of_timm("test_resnet"), ["fc"]),
    "timm efficientnet": (of_timm("test_efficientnet"), ["classifier"]),
    "timm mobilenet": (of_timm("mobilenetv3_small_050"), ["classifier"]),
    "timm resnet v2": (of_timm("resnetv2_50", **V2), ["head.fc"]),  # a 1×1 convolution
    "timm convnext": (of_timm("test_convnext"), ["head.fc"]),
    "timm distilled deit": (of_timm("deit_tiny_distilled_patch16_224", **DISTILLED), ["head", "head_dist"]),
}


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_heads_by_literal_name(name):
    build, expected = MODELS[name]
    model = build()
    pixels = torch.rand(1, 3, 32, 32) if "distilled" in name else example_pixels(model)
    found = find_heads(model, pixels)

    assert list(found) == expected
    assert all(found[head] is model.get_submodule(head) for head in expected)
    # without it the model has no logits: what it gives then is the head's input, or nothing
    for head in expected:
        nn.init.zeros_(found[head].weight)
        nn.init.zeros_(found[head].bias)
    output = model.eval()(pixels)
    assert not getattr(output, "logits", output).any()


def test_looking_changes_nothing():
    model = tiny("ResNet", **RESNET)().train()
    model.resnet.embedder.eval()  # as a frozen part would be
    before = state(model)
    flags = [module.training for module in model.modules()]
    find_heads(model, example_pixels(model))

    assert [module.training for module in model.modules()] == flags
    assert same(model, before)
    assert not any(module._forward_hooks for module in model.modules())

    model.resnet(example_pixels(model))  # the control: one pass in train mode changes BatchNorm's statistics
    assert not same(model, before)


class Own(nn.Module):
    """A user's own: the last linear layer by name and by order is not the head."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.logits = nn.Linear(12, 3)
        self.classifier = nn.Linear(3, 3)
        self.scale = scale

    def forward(self, x):
        z = self.logits(x.flatten(1))
        self.classifier(z)  # an auxiliary output that goes nowhere
        return self.scale * z


def test_a_models_own_names_do_not_mislead():
    assert list(find_heads(Own(), torch.rand(2, 3, 2, 2))) == ["logits"]


def test_named_heads_are_taken_at_their_word():
    model = Own(scale=0.5)
    assert find_heads(model, None, "logits") == {"logits": model.logits}
    assert list(find_heads(model, None, ["logits", "classifier"])) == ["logits", "classifier"]


def test_no_head_is_refused_with_the_candidates():
    with pytest.raises(SiteNotFoundError, match="No head found"):
        find_heads(Own(scale=0.5), torch.rand(2, 3, 2, 2))
    convolution = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten())
    with pytest.raises(SiteNotFoundError, match="of its 0 linear layers"):
        find_heads(convolution, torch.rand(1, 3, 2, 2))


def test_logits_that_are_no_numbers_are_refused():
    model = Own()
    model.logits.bias.data.fill_(float("nan"))
    with pytest.raises(SiteNotFoundError, match="NaN"):
        find_heads(model, torch.rand(2, 3, 2, 2))


def test_two_equal_heads_are_refused():
    class Twice(Own):
        def forward(self, x):
            z = self.logits(x.flatten(1))
            with torch.no_grad():
                self.classifier.weight.copy_(torch.eye(3))
                self.classifier.bias.zero_()
            return self.classifier(z)

    with pytest.raises(SiteNotFoundError, match="2 give"):
        find_heads(Twice(), torch.rand(2, 3, 2, 2))


def test_wrong_names_are_refused():
    with pytest.raises(SiteNotFoundError, match="'classifer'"):
        find_heads(Own(), None, "classifer")
    with pytest.raises(SiteNotFoundError, match=r"`0` \(Conv2d\) is not a linear layer"):
        find_heads(nn.Sequential(nn.Conv2d(3, 4, 2)), None, "0")


def test_what_is_not_a_classifier_is_refused():
    with pytest.raises(SiteNotFoundError, match=r"returned \(1, 4, 1, 1\), not logits"):
        find_heads(nn.Sequential(nn.Conv2d(3, 4, 2)), torch.rand(1, 3, 2, 2))
    with pytest.raises(SiteNotFoundError, match="returned BaseModelOutput"):
        find_heads(tiny("ViT", **TOKENS)().vit, torch.rand(1, 3, 32, 32))


def test_example_needs_a_configuration():
    with pytest.raises(SiteNotFoundError, match="no configuration"):
        example_pixels(Own())
    assert example_pixels(tiny("Swin", **SWIN, num_channels=1)().half()).dtype == torch.float16
    assert example_pixels(timm.create_model("test_vit")).shape == (1, 3, 160, 160)


# The house


@pytest.mark.slow
def test_classification_and_diffusion_do_not_import_each_other():
    code = (
        "import sys, more_hf\n"
        "assert not {'diffusers', 'transformers', 'torch'} & set(sys.modules), 'more_hf alone'\n"
        "import more_hf.classification.erase\n"
        "assert 'diffusers' not in sys.modules, 'classification'\n"
        "assert 'more_hf.diffusion' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_timms_linear_is_edited_and_a_quantized_subclass_is_not():
    class Quantized(nn.Linear):
        """Its forward may be anything."""

    images, labels = torch.rand(14, 3, 32, 32), torch.arange(14) % 7
    model = timm.create_model("mobilenetv3_small_050", num_classes=7)
    before = model.classifier.weight.clone()
    more_hf.erase_classes(model, [(images, labels)], forget=[0], remap_to=[1])
    assert not torch.equal(model.classifier.weight, before)
    more_hf.restore(model)
    assert torch.equal(model.classifier.weight, before)

    model.classifier.__class__ = Quantized
    with pytest.raises(SiteNotFoundError, match="quantized or wrapped"):
        more_hf.erase_classes(model, [(images, labels)], forget=[0], remap_to=[1])
