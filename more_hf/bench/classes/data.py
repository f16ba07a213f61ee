"""Images, labels and class names of the knowledge-deletion benchmark, and the splits D_f, D_r, D_ft, D_rt of the paper.

`load_kd_data` has one entry per data set. Digits and Fashion-MNIST need no network; the others come through the `datasets` library, from
the Hub or from a local copy with the same columns; any other name is the path of a folder of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from .sources import SOURCES, DatasetError, HubImages, from_folder, stratified


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset):
    """Images with labels: indexed by one number like any torch data set, or by many for a whole batch at once.

    Attributes:
        images (`Tensor` or `HubImages`): uint8 `(N, channels, H, W)`, shared by all subsets.
        labels (`Tensor`): `(n,)`, int64, of this subset.
        rows (`Tensor`): `(n,)`, int64, which images this subset has.
        image_size (`int`): height and width of `pixel_values`; other images are resized, bilinear with antialias.
        mean, std (`tuple[float, ...]`): one number, or one per channel: `pixel_values = (images / 255 − mean) / std`.
    """

    images: Tensor | HubImages
    labels: Tensor
    rows: Tensor
    image_size: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """`pixel_values` `(…, channels, image_size, image_size)` float32 and `labels` `(…)` int64."""
        index = torch.as_tensor(index)
        pixels = self.images[self.rows[index].reshape(-1)].float() / 255
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            pixels = interpolate(pixels, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = (pixels - mean) / std
        return {"pixel_values": pixels.reshape(*index.shape, *pixels.shape[1:]), "labels": self.labels[index]}

    def subset(self, index: Tensor) -> ImageSet:
        """Those of `index` (int64, or a boolean mask), without copying an image."""
        return replace(self, labels=self.labels[index], rows=self.rows[index])

    def loader(self, batch_size: int = 256, *, seed: int | None = None) -> DataLoader:
        """Batches in order, or shuffled anew in each epoch from `seed` on."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(_Whole(self), batch_size, shuffle=seed is not None, generator=generator, collate_fn=_as_it_is)


class _Whole(Dataset):
    """An `ImageSet` that a loader asks for whole batches: one indexing instead of one per image."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, index: list[int]) -> dict[str, Tensor]:
        return self.images[index]


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


@dataclass(frozen=True)
class KDData:
    """One data set: `train`, `validation` (carved from the training data, for choosing hyper-parameters) and `test`."""

    name: str
    class_names: tuple[str, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    channels: int
    flip: bool  # whether a mirrored image is one of the same class

    @property
    def image_size(self) -> int:
        return self.train.image_size

    def class_ids(self, classes: Sequence[str | int]) -> tuple[int, ...]:
        """Ids of classes given by name or id. Raises `DatasetError` for one that there is not, or that is named twice."""
        ids = tuple(self.class_names.index(c) if c in self.class_names else c for c in classes)
        if unknown := [c for c in ids if c not in range(len(self.class_names))]:
            raise DatasetError(f"{self.name} has no class {unknown[0]!r}. Its classes are {', '.join(self.class_names)}.")
        if len(set(ids)) != len(ids):
            raise DatasetError(f"The classes {list(classes)} name one of them twice. Name each class once.")
        return ids


@dataclass(frozen=True)
class Splits:
    """The subsets that accuracies are named after: acc_f, acc_r (training data), acc_ft, acc_rt (test data); fv, rv are validation."""

    f: ImageSet
    r: ImageSet
    fv: ImageSet
    rv: ImageSet
    ft: ImageSet
    rt: ImageSet


def split_by_class(data: KDData, forget: Sequence[str | int]) -> Splits:
    """Forget whole classes (appendix B.1). Raises `DatasetError` for an unknown class, and unless some are forgotten and some remain."""
    ids = torch.tensor(data.class_ids(forget), dtype=torch.int64)
    if not 0 < len(ids) < len(data.class_names):
        raise DatasetError(f"{len(ids)} of the {len(data.class_names)} classes of {data.name} are to be forgotten: leave at least one.")
    parts = [(part, torch.isin(part.labels, ids)) for part in (data.train, data.validation, data.test)]
    return Splits(*(part.subset(mask) for part, inside in parts for mask in (inside, ~inside)))


def split_by_sample(data: KDData, fraction: float = 0.1, *, seed: int = 0) -> Splits:
    """Forget a random fraction of the training images of all classes (section 4.3). D_ft and fv are empty; D_rt is the whole test set."""
    count = round(fraction * len(data.train))
    if not 0 < count < len(data.train):
        raise DatasetError(f"A fraction of {fraction} forgets {count} of {len(data.train)} images. Choose one between 0 and 1.")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    none = torch.zeros(0, dtype=torch.int64)
    return Splits(
        f=data.train.subset(order[:count].sort().values),
        r=data.train.subset(order[count:].sort().values),
        fv=data.validation.subset(none),
        rv=data.validation,
        ft=data.test.subset(none),
        rt=data.test,
    )


def load_kd_data(
    name: str,
    *,
    path: str | Path | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    validation: float = 0.1,
    seed: int = 0,
) -> KDData:
    """Load a data set and carve the validation split from its training data.

    Args:
        name (`str`): `"digits"`, `"fashion-mnist"`, `"emoji-100"`, `"cifar10"`, `"cifar100"`, `"tiny-imagenet"`, `"imagenet-1k"`, or the
            path of a folder of images, `train/CLASS/*.png` and `test/CLASS/*.png`.
        path (`str` or `Path`, *optional*): where the data lie instead of their usual place: a folder with the files or columns that the
            Hub's data set has. `"emoji-100"` always needs the folder that `benchmarks/emoji_sd/data.py` wrote.
        image_size (`int`, *optional*): resize to this height and width; the data's own by default (224 for ImageNet and for a folder).
        channels (`int`, *optional*): 3 repeats grey images, for a model that reads colour.
        mean, std (`Sequence[float]`): of the normalisation, one number or one per channel; by default pixels lie in [−1, 1].
        validation (`float`, defaults to 0.1): fraction of each class's training images that becomes `validation`.
        seed (`int`, defaults to 0): of the validation split.

    Returns:
        `KDData`: on the CPU. ImageNet and folders are decoded when they are read, all others are in memory.

    Raises:
        `DatasetError`: for an unknown name, a missing folder, or a data set without test images.
    """
    if name in SOURCES:
        raw = SOURCES[name](None if path is None else Path(path), image_size)
    elif Path(name).is_dir():
        raw = from_folder(Path(name), image_size)
    else:
        raise DatasetError(f"There is no data set {name!r}, nor a folder. There are {', '.join(SOURCES)}, and any folder of images.")
    grey = raw.channels == 1
    if channels not in (None, raw.channels) and not (grey and channels == 3):
        raise DatasetError(f"The images of {name} have {raw.channels} channels, not {channels}. Only grey images can be given three.")
    repeat = channels == 3 and grey
    parts = []
    for images, labels in (raw.train, raw.test):
        images = images.expand(-1, 3, -1, -1) if repeat else images
        size = image_size or images.shape[-1]
        parts.append(ImageSet(images, labels, torch.arange(len(labels)), size, tuple(mean), tuple(std)))
    train, test = parts
    held_out = stratified(train.labels, validation, seed)
    return KDData(name, raw.class_names, train.subset(~held_out), train.subset(held_out), test, channels or raw.channels, raw.flip)
