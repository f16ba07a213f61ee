"""Classifiers of the knowledge-deletion benchmark: the paper's, and narrower ones for two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from more_hf.data.models import AllCNNConfig, SmallStemResNetConfig

from ..errors import BenchmarkError
from ..splits import KDData


def _allcnn(width: int) -> Callable[..., PreTrainedConfig]:
    return lambda image_size, **labels: AllCNNConfig(width=width, **labels)


def _resnet18(widths: list[int], stem_stride: int) -> Callable[..., PreTrainedConfig]:
    shape = {"embedding_size": widths[0], "hidden_sizes": widths, "stem_stride": stem_stride}
    blocks = {"depths": [2, 2, 2, 2], "layer_type": "basic"}
    return lambda image_size, **labels: SmallStemResNetConfig(**shape, **blocks, **labels)


def _vit(width: int, layers: int, heads: int, expansion: int = 4, **fixed) -> Callable[..., PreTrainedConfig]:
    # transformers' own initializer_range of 0.02 suits ViT-B and stalls a narrow model.
    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": expansion * width,
        "initializer_range": width**-0.5,
    }

    def config(image_size: int, **labels) -> PreTrainedConfig:
        pixels = {"image_size": image_size, "patch_size": image_size // 4}
        return ViTConfig(**{**pixels, **shape, **fixed, **labels})

    return config


MODELS = {
    "allcnn": _allcnn(96),
    "resnet18": _resnet18([64, 128, 256, 512], stem_stride=1),
    "vit-base": _vit(768, 12, 12, patch_size=16, initializer_range=0.02),
    "allcnn-narrow": _allcnn(32),
    "resnet18-narrow": _resnet18([16, 32, 64, 192], stem_stride=2),
    "vit-narrow": _vit(96, 4, 4, expansion=2),
}
"""Name to configuration: the paper's sizes, and narrower ones. `vit-base` needs data with
`image_size=224`."""


def build_classifier(name: str, data: KDData, *, seed: int = 0) -> PreTrainedModel:
    """Build one of `MODELS` with random weights for a data set, in training mode, on the CPU. The global
    random state is not touched.

    Raises:
        `BenchmarkError`: for an unknown name.
    """
    if name not in MODELS:
        raise BenchmarkError(f"There is no classifier {name!r}. There are {', '.join(MODELS)}.")
    config = MODELS[name](data.image_size, num_channels=data.channels, **_labels(data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageClassification.from_config(config)


def pretrained_inputs(path: str) -> dict[str, Any]:
    """Read from a pretrained classifier, by its folder or Hub id, how its images must be loaded: the
    arguments `image_size`, `channels`, `mean` and `std` of `load_kd_data`. Empty for a folder without an
    image processor, which is what the benchmark's own training leaves: such a model reads the data unchanged.
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
    """Load a pretrained classifier by its folder or Hub id, as the paper's ResNet-18 and ViT-B/16, with a
    head for a data set, whose images must have the channels that it reads; in training mode, on the CPU.
    `seed` is of the new head, where the pretrained one has another shape.

    Raises:
        `BenchmarkError`: if anything but the head has another shape, the first convolution above all.
    """
    channels = AutoConfig.from_pretrained(path).num_channels
    if channels != data.channels:
        raise BenchmarkError(
            f"The first convolution of {path} reads {channels} channels, the images of {data.name} have "
            f"{data.channels}. Load the data with `load_kd_data(name, **pretrained_inputs(path))`."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = AutoModelForImageClassification.from_pretrained(
            path, **_labels(data), dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    random = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if others := sorted(key for key in random if "classifier" not in key):
        raise BenchmarkError(
            f"{path} has no weights that fit {others[0]!r}: "
            "more than its head would start from random numbers. Choose the checkpoint of such a classifier."
        )
    return model.train()


def _labels(data: KDData) -> dict[str, Any]:
    names = dict(enumerate(data.class_names))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
