"""Classifiers of the knowledge-deletion benchmark: the paper's, and narrowed ones that train on two CPU cores.

ViT and the pretrained ResNet are transformers' own. AllCNN and the ResNet with a 3×3 stem, which transformers does not have, are small
`PreTrainedModel`s registered with the auto classes when this module is imported, so that saving, loading, `id2label`, `more_hf.save` and
`pipeline` treat all of them alike; a plain `nn.Module` would need a path of its own in each of these places.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from ...core.errors import MoreError
from .data import KDData


class ClassifierError(MoreError, ValueError):
    """The classifier does not fit the data, or there is none of that name."""


class AllCNNConfig(PreTrainedConfig):
    """`width`: channels of the last seven convolutions, and the width of a feature; the first two have half of them (96 in the paper)."""

    model_type = "allcnn"
    num_channels: int = 3
    width: int = 96


class AllCNNForImageClassification(PreTrainedModel):
    """The all-convolutional network (Springenberg et al. 2015) in the layout of the unlearning literature.

    Seven 3×3 convolutions, the third and the sixth with stride 2, and one 1×1, each with batch normalisation and ReLU; then the mean over
    positions, which is the feature, and one linear layer.
    """

    config_class = AllCNNConfig
    base_model_prefix = "features"
    main_input_name = "pixel_values"

    def __init__(self, config: AllCNNConfig):
        super().__init__(config)
        half, full = config.width // 2, config.width
        widths = [config.num_channels, half, half, full, full, full, full, full]
        strides = [1, 1, 2, 1, 1, 2, 1]
        blocks = [_block(i, o, 3, stride) for (i, o), stride in zip(pairwise(widths), strides, strict=True)]
        self.features = nn.Sequential(*blocks, _block(full, full, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(full, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, (nn.Linear, nn.BatchNorm2d)):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutputWithNoAttention:
        """`pixel_values` `(batch, num_channels, H, W)`, `labels` `(batch,)`: `logits` `(batch, num_labels)`, and `loss` with labels."""
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class SmallStemResNetConfig(ResNetConfig):
    """A `ResNetConfig` with `stem_stride`: 1 is the stem that the field uses for CIFAR, 2 halves the image once."""

    model_type = "small_stem_resnet"
    stem_stride: int = 1


class SmallStemResNetForImageClassification(ResNetForImageClassification):
    """transformers' ResNet with a 3×3 first convolution and no pooling after it, for images of 28 to 64 pixels."""

    config_class = SmallStemResNetConfig

    def __init__(self, config: SmallStemResNetConfig):
        super().__init__(config)
        stem = self.resnet.embedder
        stride = config.stem_stride
        stem.embedder.convolution = nn.Conv2d(config.num_channels, config.embedding_size, 3, stride, padding=1, bias=False)
        stem.pooler = nn.Identity()
        self.post_init()


AutoConfig.register("allcnn", AllCNNConfig)
AutoModelForImageClassification.register(AllCNNConfig, AllCNNForImageClassification)
AutoConfig.register("small_stem_resnet", SmallStemResNetConfig)
AutoModelForImageClassification.register(SmallStemResNetConfig, SmallStemResNetForImageClassification)


def _allcnn(width: int) -> Callable[..., PreTrainedConfig]:
    return lambda image_size, **labels: AllCNNConfig(width=width, **labels)


def _resnet18(widths: list[int], stem_stride: int) -> Callable[..., PreTrainedConfig]:
    shape = {"embedding_size": widths[0], "hidden_sizes": widths, "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return lambda image_size, **labels: SmallStemResNetConfig(stem_stride=stem_stride, **shape, **labels)


def _vit(width: int, layers: int, heads: int, patch_size: int | None = None, expansion: int = 4) -> Callable[..., PreTrainedConfig]:
    def config(image_size: int, **labels) -> PreTrainedConfig:
        return ViTConfig(
            image_size=image_size,
            patch_size=patch_size or image_size // 4,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=expansion * width,
            initializer_range=0.02 if patch_size else width**-0.5,  # 0.02 suits ViT-B and stalls a narrow one
            **labels,
        )

    return config


MODELS = {
    "allcnn": _allcnn(96),
    "resnet18": _resnet18([64, 128, 256, 512], stem_stride=1),
    "vit-base": _vit(768, 12, 12, patch_size=16),
    "allcnn-narrow": _allcnn(32),
    "resnet18-narrow": _resnet18([16, 32, 64, 192], stem_stride=2),
    "vit-narrow": _vit(96, 4, 4, expansion=2),
}
"""Name to configuration: the paper's sizes, and narrowed. `vit-base` wants data with `image_size=224`."""


def build_classifier(name: str, data: KDData, *, seed: int = 0) -> PreTrainedModel:
    """A classifier with random weights for a data set, in training mode on the CPU. Does not touch the global random state.

    Raises `ClassifierError` for an unknown name.
    """
    if name not in MODELS:
        raise ClassifierError(f"There is no classifier {name!r}. There are {', '.join(MODELS)}.")
    config = MODELS[name](data.image_size, num_channels=data.channels, **_labels(data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageClassification.from_config(config)


def pretrained_inputs(path: str) -> dict[str, Any]:
    """What a pretrained classifier reads, as arguments of `load_kd_data`: `image_size`, `channels`, `mean`, `std`.

    `path` is a folder or Hub id. A folder without an image processor, as the benchmark's own training leaves it, reads the data as they
    are: nothing is returned.
    """
    if (Path(path) / CONFIG_NAME).is_file() and not (Path(path) / IMAGE_PROCESSOR_NAME).is_file():
        return {}
    config, processor = AutoConfig.from_pretrained(path), AutoImageProcessor.from_pretrained(path)
    return {
        "image_size": processor.size.height or processor.size.shortest_edge,
        "channels": config.num_channels,
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
    }


def load_pretrained(path: str, data: KDData, *, seed: int = 0) -> PreTrainedModel:
    """A pretrained classifier with a new head for a data set: the ImageNet ResNet-18 and ViT-B/16 of the paper, or any other.

    Only the head may differ in shape. Raises `ClassifierError` if anything else does, the first convolution above all.
    """
    channels = AutoConfig.from_pretrained(path).num_channels
    if channels != data.channels:
        raise ClassifierError(
            f"The first convolution of {path} reads {channels} channels, the images of {data.name} have {data.channels}. "
            "Load the data with `load_kd_data(name, **pretrained_inputs(path))`."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = AutoModelForImageClassification.from_pretrained(
            path, **_labels(data), dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if others := sorted(key for key in new if "classifier" not in key):
        raise ClassifierError(f"{path} has no weights that fit {others[0]!r}: more than its head would start from random numbers.")
    return model.train()


def _labels(data: KDData) -> dict[str, Any]:
    names = dict(enumerate(data.class_names))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
