"""Where the data sets of the knowledge-deletion benchmark come from: one function for each, images and labels as they are there."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..splits import DatasetError
from .emoji import hundred_things


DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package dataset-fashion-mnist puts its files
FASHION_MNIST_CLASSES = (
    "T-shirt or top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class RawData:
    """What a source gives: images uint8 `(n, channels, H, W)` with labels int64 `(n,)`, for training and test."""

    train: tuple[Tensor | HubImages, Tensor]
    test: tuple[Tensor | HubImages, Tensor]
    class_names: tuple[str, ...]
    flip: bool = True

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]


def stratified(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """A random mask `(n,)` that holds `fraction` of each class, rounded: the same for the same seed."""
    chance = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        mask[members[chance[members].argsort()[: round(fraction * len(members))]]] = True
    return mask


def from_digits(path: None, image_size: int | None) -> RawData:
    """scikit-learn's digits, 1,797 grey images of 8×8; they come unsplit: a fifth of each class, always the same, is the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    test = stratified(labels, 0.2, seed=0)
    return RawData((images[~test], labels[~test]), (images[test], labels[test]), tuple(map(str, range(10))), flip=False)


def from_fashion_mnist(path: Path | None, image_size: int | None) -> RawData:
    """Fashion-MNIST's IDX files from `path` or the Debian package, else from the Hub."""
    folder = path or DEBIAN_FASHION_MNIST
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        return replace(from_hub(HUB["fashion-mnist"])(path, image_size), class_names=FASHION_MNIST_CLASSES)
    parts = []
    for part in ("train", "t10k"):
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long()
        parts.append((read_idx(folder / f"{part}-images-idx3-ubyte.gz")[:, None], labels))
    return RawData(*parts, FASHION_MNIST_CLASSES)


def read_idx(path: Path) -> Tensor:
    """A gzipped IDX file of bytes: two zeros, the type 8, the number of dimensions, each as a big-endian int32, then the bytes."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, -1, 4 + 4 * raw[3]).copy()).reshape(tuple(int(n) for n in shape))


def from_emoji(path: Path | None, image_size: int | None) -> RawData:
    """A hundred things as classes, ten artists' drawings as their samples."""
    if path is None or not (path / "images.npz").is_file():
        raise DatasetError(f"emoji-100 needs `path`, the folder that benchmarks/emoji_sd/data.py wrote: {path} has no images.npz.")
    return RawData(*hundred_things(path, image_size or 32))


class HubImages:
    """Images in a column of a `datasets.Dataset`, decoded when they are read: shorter side resized to `size`, then the centre."""

    def __init__(self, dataset, column: str, size: int, channels: int):
        self.dataset, self.column = dataset.select_columns(column), column
        self.shape = (len(dataset), channels, size, size)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 `(n, channels, size, size)`."""
        return torch.stack([self._square(self.dataset[row][self.column]) for row in rows.tolist()])

    def _square(self, image) -> Tensor:
        channels, size = self.shape[1:3]
        image = image.convert("L" if channels == 1 else "RGB")
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height)).crop((left, top, left + size, top + size))
        return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1)


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the Hub, and what its columns and its test split are called."""

    path: str
    image: str
    label: str
    test: str
    size: int
    channels: int = 3
    in_memory: bool = True


HUB = {
    "fashion-mnist": HubSource("zalando-datasets/fashion_mnist", "image", "label", "test", 28, channels=1),
    "cifar10": HubSource("uoft-cs/cifar10", "img", "label", "test", 32),
    "cifar100": HubSource("uoft-cs/cifar100", "img", "fine_label", "test", 32),
    "tiny-imagenet": HubSource("zh-plus/tiny-imagenet", "image", "label", "valid", 64),
    "imagenet-1k": HubSource("ILSVRC/imagenet-1k", "image", "label", "validation", 224, in_memory=False),
}


def from_hub(source: HubSource) -> Callable[[Path | None, int | None], RawData]:
    """A loader of a data set on the Hub, or of a local copy with the same columns."""

    def load(path: Path | None, image_size: int | None) -> RawData:
        from datasets import load_dataset

        splits = load_dataset(source.path if path is None else str(path))
        return read_splits(splits, source, source.size if source.in_memory else image_size or source.size)

    return load


def from_folder(path: Path, image_size: int | None) -> RawData:
    """A folder of images by split and class: `train`, and `test` or else `validation`."""
    from datasets import load_dataset

    splits = load_dataset("imagefolder", data_dir=str(path))
    test = next((split for split in ("test", "validation") if split in splits), None)
    if test is None or "train" not in splits or "label" not in splits["train"].features:
        raise DatasetError(f"{path} needs the folders train/CLASS and test/CLASS; it has the splits {', '.join(splits)}.")
    return read_splits(splits, HubSource(str(path), "image", "label", test, 224, in_memory=False), image_size or 224)


def read_splits(splits, source: HubSource, size: int) -> RawData:
    """Images and labels out of a `DatasetDict`."""
    parts = []
    for split in ("train", source.test):
        images = HubImages(splits[split], source.image, size, source.channels)
        labels = torch.tensor(splits[split].select_columns(source.label)[:][source.label])
        parts.append((images[torch.arange(len(labels))] if source.in_memory else images, labels))
    return RawData(*parts, tuple(splits["train"].features[source.label].names))


SOURCES = {
    "digits": from_digits,
    "fashion-mnist": from_fashion_mnist,
    "emoji-100": from_emoji,
    **{name: from_hub(source) for name, source in HUB.items() if name != "fashion-mnist"},
}
