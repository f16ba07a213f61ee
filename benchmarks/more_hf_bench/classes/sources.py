"""The sources of the data sets: one function each, which returns images and labels unchanged."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from ..errors import BenchmarkError
from ..splits import Images


# Where the Debian package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt or top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip

LEARNT_BY_HEART = 6000  # images of Fashion-MNIST that a small classifier can be fitted to entirely

EMOJI_CLASSES = 100
HELD_OUT = 2  # drawings of each emoji that only the test set has
TRAIN_VIEWS, TEST_VIEWS = 25, 5  # images made of one drawing


@dataclass(frozen=True)
class RawData:
    """uint8 images `(n, channels, H, W)` with int64 labels `(n,)`, for training and test."""

    train: tuple[Images, Tensor]
    test: tuple[Images, Tensor]
    class_names: tuple[str, ...]
    flip: bool = True

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]


def stratified(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Draw a mask `(n,)` that holds `fraction` of each class, rounded."""
    chance = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        drawn = chance[members].argsort()[: round(fraction * len(members))]
        mask[members[drawn]] = True
    return mask


def from_digits(path: None, image_size: int | None) -> RawData:
    """Load scikit-learn's digits, 1,797 grey images of 8×8.

    They come unsplit; a fifth of each class, always the same, is the test set.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            "The data set digits comes with scikit-learn, which is not installed. "
            "Install what the benchmarks need: pip install 'more_hf[bench]'."
        ) from error

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    test = stratified(labels, 0.2, seed=0)
    names = tuple(map(str, range(10)))
    return RawData((images[~test], labels[~test]), (images[test], labels[test]), names, flip=False)


def from_fashion_mnist(path: Path | None, image_size: int | None) -> RawData:
    """Load Fashion-MNIST's IDX files from `path` or the Debian package, else the data set from the Hub."""
    folder = path or DEBIAN_FASHION_MNIST
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        return replace(from_hub(HUB["fashion-mnist"])(path, image_size), class_names=FASHION_MNIST_CLASSES)

    def part(name: str) -> tuple[Tensor, Tensor]:
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")[:, None]
        return images, read_idx(folder / f"{name}-labels-idx1-ubyte.gz").long()

    return RawData(part("train"), part("t10k"), FASHION_MNIST_CLASSES)


def from_fashion_mnist_6000(path: Path | None, image_size: int | None) -> RawData:
    """Load the first 6,000 training images of Fashion-MNIST, about 600 a class, and all its test images.

    They are not mirrored: a classifier is to know every one of them as it is, as the paper's originals do.
    """
    raw = from_fashion_mnist(path, image_size)
    images, labels = raw.train
    return replace(raw, train=(images[:LEARNT_BY_HEART], labels[:LEARNT_BY_HEART]), flip=False)


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes.

    It has two zeros, the type 8, the number of dimensions, each dimension as a big-endian int32, then the
    bytes.
    """
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", dimensions, offset=4).tolist()
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)).reshape(shape)


def from_emoji(path: Path | None, image_size: int | None) -> RawData:
    """Load emoji as a hundred classes: a thing is a class, views of its artists' drawings are its images.

    `path` is what `benchmarks/emoji_sd/data.py` rendered. Which drawings are held out, and how each view is
    moved and recoloured, is always the same.
    """
    if path is None or not (path / "images.npz").is_file():
        raise BenchmarkError(
            "The data set emoji-100 needs `path`, the folder that benchmarks/emoji_sd/data.py wrote: "
            f"{path} has no images.npz."
        )
    meta = json.loads((path / "meta.json").read_text("utf-8"))
    with np.load(path / "images.npz") as arrays:
        drawings, names = arrays["images"], arrays["name"]
    rows = {thing: (names == meta["names"].index(thing)).nonzero()[0] for thing in meta["things"]}
    most_drawn = sorted(rows, key=lambda thing: -len(rows[thing]))[:EMOJI_CLASSES]

    # Hold drawings out before views are made: no view of a test drawing is in the training set.
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for thing in most_drawn:
        shuffled = torch.from_numpy(rows[thing])[torch.randperm(len(rows[thing]), generator=generator)]
        test.append(shuffled[:HELD_OUT])
        train.append(shuffled[HELD_OUT:])

    def part(groups: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(len(groups)).repeat_interleave(torch.tensor(list(map(len, groups))) * count)
        pixels = torch.from_numpy(drawings[torch.cat(groups)]).permute(0, 3, 1, 2) / 127.5 - 1
        size = image_size or 32
        small = interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        return views(small.repeat_interleave(count, 0), generator), labels

    class_names = tuple(thing.replace("-", " ") for thing in most_drawn)
    return RawData(part(train, TRAIN_VIEWS), part(test, TEST_VIEWS), class_names)


def views(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Make a random view of each image `(n, 3, size, size)` in [−1, 1]: uint8, of the same shape.

    Each is mirrored or not, turned by at most 15 degrees, scaled by 0.8 to 1.1, shifted by at most a
    sixteenth; its contrast and brightness change by at most a fifth. Outside of an image is white.
    """
    n = len(pixels)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    # The order of the draws decides about the images.
    mirror = draw(0, 1).round() * 2 - 1
    angle, scale = draw(-15, 15) * math.pi / 180, draw(0.8, 1.1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [cos * mirror, -sin, draw(-1 / 8, 1 / 8), sin * mirror, cos, draw(-1 / 8, 1 / 8)]
    theta = torch.stack(rows, dim=1).reshape(n, 2, 3)
    contrast = draw(0.8, 1.2)[:, None, None, None]
    brightness = draw(-0.2, 0.2)[:, None, None, None]

    # grid_sample pads with zeros; on 1 − pixels, zero is white.
    grid = affine_grid(theta, list(pixels.shape), align_corners=False)
    ink = grid_sample(1 - pixels, grid, align_corners=False)
    shown = ((1 - ink) * contrast + brightness).clamp(-1, 1)
    return ((shown + 1) * 127.5).round().to(torch.uint8)


class HubImages:
    """Images in a column of a `datasets.Dataset`, decoded when they are indexed.

    The shorter side is resized to `size`, then the centre is cut out.
    """

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
    """A data set on the Hub, and the names of its columns and of its test split."""

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
    """Return the loader of a data set on the Hub, or of a local copy with the same columns."""

    def load(path: Path | None, image_size: int | None) -> RawData:
        from datasets import load_dataset

        splits = load_dataset(source.path if path is None else str(path))
        size = source.size if source.in_memory else image_size or source.size
        return read_splits(splits, source, size)

    return load


def from_folder(path: Path, image_size: int | None) -> RawData:
    """Load a folder of images by split and class: `train`, and `test` or else `validation`."""
    from datasets import load_dataset

    splits = load_dataset("imagefolder", data_dir=str(path))
    test = next((split for split in ("test", "validation") if split in splits), None)
    if test is None or "train" not in splits or "label" not in splits["train"].features:
        raise BenchmarkError(
            f"{path} needs the folders train/CLASS and test/CLASS; it has the splits {', '.join(splits)}."
        )
    source = HubSource(str(path), "image", "label", test, 224, in_memory=False)
    return read_splits(splits, source, image_size or source.size)


def read_splits(splits, source: HubSource, size: int) -> RawData:
    """Take images and labels out of a `DatasetDict`."""

    def part(split: str) -> tuple[Images, Tensor]:
        images = HubImages(splits[split], source.image, size, source.channels)
        labels = torch.tensor(splits[split].select_columns(source.label)[:][source.label])
        return (images[torch.arange(len(labels))] if source.in_memory else images), labels

    return RawData(part("train"), part(source.test), tuple(splits["train"].features[source.label].names))


SOURCES = {
    "digits": from_digits,
    "fashion-mnist": from_fashion_mnist,
    "fashion-mnist-6000": from_fashion_mnist_6000,
    "emoji-100": from_emoji,
    **{name: from_hub(source) for name, source in HUB.items() if name != "fashion-mnist"},
}
