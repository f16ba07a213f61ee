"""`--rehearse`: a benchmark from its first line to its last, on stand-ins of the same form, within minutes.

The stand-ins lie in `stand-ins` of the output's folder: a pipeline of Stable Diffusion's classes, a data set
in the files and columns of the Hub's, a ViT or ResNet of random weights. All numbers are meaningless.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BenchmarkError


if TYPE_CHECKING:
    from .artists import ArtistsOptions
    from .classes import KDOptions

logger = logging.getLogger(__name__)

CLASSES = 20  # at most, where there may be a thousand
IMAGES = {"train": 12, "test": 10}  # of each class
WIDTH, TOO_NARROW = 32, 16  # of a ViT or ResNet; for more classes than features, as ImageNet has for ViT-B/16

# What takes long, of the methods that train
SHORT = {
    "ca": {"images": 4, "iterations": 2, "sampling_steps": 2},
    "esd": {"iterations": 2, "sampling_steps": 2},
}

# The columns of the paper's tables
OF_PICTURES = [f"lpips{size}_{part}" for size in ("", "_64_rece") for part in "frd"]
_ACCURACIES = ("acc_f", "acc_r", "acc_ft", "acc_rt", "hm", "hm_t")
OF_CLASSES = [*_ACCURACIES, *(f"kr_{name}" for name in _ACCURACIES), "mia_loss"]
OF_SAMPLES = ["acc_f", "acc_r", "acc_rt", "mia_member", "gap"]


def rehearse_artists(options: ArtistsOptions, output: Path) -> ArtistsOptions:
    """The same benchmark on the embedded pipeline, which has Stable Diffusion's classes, and few pictures."""
    from more_hf.data import load_emoji_sd

    folder = output / "stand-ins" / "pipeline"
    if not folder.is_dir():
        load_emoji_sd().save_pretrained(folder)
    tuned = dict(options.tuned or {})
    for method, short in SHORT.items():
        if method in options.methods:
            tuned[method] = {**tuned.get(method, {}), **short}
    few = {"limit": 1, "pictures": [2, 2], "steps": 2}
    return replace(options, model=str(folder), judges="none", tuned=tuned, **few)


def rehearse_classes(options: KDOptions, output: Path) -> KDOptions:
    """The same benchmark on a few random images and narrow networks, trained for one epoch."""
    from ..classes.sources import HUB

    if options.dataset not in HUB:
        raise BenchmarkError(
            f"There is no stand-in for the data set {options.dataset}. There are for {', '.join(HUB)}."
        )
    folder, large = output / "stand-ins", options.dataset == "imagenet-1k"
    count = 10 if options.dataset in ("cifar10", "fashion-mnist") else CLASSES
    _write_images(folder / "data", options.dataset, count)
    forget = options.forget
    if forget != "samples":
        forget = [_first_classes(entry, count) for entry in forget]
    model = {"allcnn": "allcnn-narrow", "resnet18": "resnet18-narrow"}.get(options.model)
    if model is None:
        # A classifier that is taken as it is has a head for the data already.
        classes = count if options.epochs == 0 else 3
        model = _write_model(folder, "resnet" in options.model, TOO_NARROW if large else WIDTH, classes)
    tuned = {
        method: _fewer_experts(settings, count // 2) for method, settings in (options.tuned or {}).items()
    }
    return replace(
        options,
        data=str(folder / "data"),
        model=model,
        forget=forget,
        fraction=0.5,  # of so few images, for some of each class
        tuned=tuned,
        seeds=1,
        epochs=options.epochs if options.epochs == 0 else 1,
        probe_seeds=1,
        num_workers=min(options.num_workers, 1),
    )


def _first_classes(entry: str, count: int) -> str:
    return "+".join(name for name in entry.split("+") if int(name) < count)


def _fewer_experts(settings: Mapping[str, Any], most: int) -> dict[str, Any]:
    return {name: min(value, most) if name == "num_experts" else value for name, value in settings.items()}


def _write_images(folder: Path, dataset: str, count: int) -> None:
    """Write random images in the Hub's layout: a Parquet file for each split, with its columns."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image

    from ..classes.sources import HUB

    source, noise = HUB[dataset], np.random.default_rng(0)
    features = Features(
        {source.image: Image(), source.label: ClassLabel(names=[f"class {i}" for i in range(count)])}
    )
    size = (32, 40) if dataset == "imagenet-1k" else (source.size, source.size)
    for split, images in (("train", IMAGES["train"]), (source.test, IMAGES["test"])):
        labels = np.repeat(np.arange(count), images)
        # A class has a color of its own, so that there is something to learn.
        colors = np.random.default_rng(1).integers(0, 192, (count, 1, 1, 3))[labels]
        pixels = (colors + noise.integers(0, 64, (len(labels), *size, 3))).astype(np.uint8)
        table = Dataset.from_dict(
            {source.image: list(pixels), source.label: labels.tolist()}, features=features
        )
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path)


def _write_model(folder: Path, is_resnet: bool, width: int, classes: int) -> str:
    """Write a ResNet-18 or ViT-B/16 of small width for 32 pixels, with its image processor."""
    import torch
    from transformers import AutoModelForImageClassification as Classifier
    from transformers import ConvNextImageProcessor, ResNetConfig, ViTConfig, ViTImageProcessor

    if is_resnet:
        shape = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, width], "depths": [2, 2, 2, 2]}
        config = ResNetConfig(layer_type="basic", num_labels=classes, **shape)
        processor = ConvNextImageProcessor(size={"shortest_edge": 32})
    else:
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
        config = ViTConfig(image_size=32, patch_size=16, num_attention_heads=2, num_labels=classes, **shape)
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier.from_config(config)
    folder /= "resnet-18" if is_resnet else "vit-b16"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def check_filled(
    summary: Sequence[Mapping[str, Any]], methods: Sequence[str], columns: Sequence[str]
) -> None:
    """Raise `BenchmarkError` unless each method has a number in every column, for all that is forgotten."""
    entries = dict.fromkeys(line["forget"] for line in summary)
    lines = {(line["method"], line["forget"]): line for line in summary}
    empty = []
    for method in methods:
        for forget in entries:
            line = lines.get((method, forget), {})
            empty += [f"{method}, {forget}: {name}" for name in columns if line.get(name) in (None, "")]
    if empty:
        raise BenchmarkError(
            f"The rehearsal left {len(empty)} cells of the table empty: {'; '.join(empty[:5])}. Run it again "
            "with these methods alone, and read what they say."
        )
    logger.info("Rehearsed: every cell of the table is filled. The numbers mean nothing.")
