"""Labelled images, and the subsets D_f, D_r, D_ft and D_rt that a method gets and is measured on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from .errors import BenchmarkError


class Images(Protocol):
    """uint8 images `(N, channels, H, W)`: a `Tensor`, or anything that decodes them when indexed."""

    shape: Sequence[int]

    def __getitem__(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset):
    """Images with labels, indexed by one number or by many for a whole batch at once."""

    images: Images  # shared by all subsets
    labels: Tensor  # `(n,)`, int64, of this subset
    rows: Tensor  # `(n,)`, int64, the images that this subset has
    image_size: int  # height and width of `pixel_values`; other images are resized, bilinear with antialias
    # mean, std: one number, or one per channel: `pixel_values = (images / 255 − mean) / std`
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    workers: int = 0  # processes of each loader that decode images

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """`pixel_values` `(…, channels, image_size, image_size)` float32 and `labels` `(…)` int64."""
        index = torch.as_tensor(index)
        pixels = self.images[self.rows[index].reshape(-1)].float() / 255
        size = (self.image_size, self.image_size)
        if pixels.shape[-2:] != size:
            pixels = interpolate(pixels, size, mode="bilinear", antialias=True)
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        pixels = (pixels - mean) / std
        return {"pixel_values": pixels.reshape(*index.shape, *pixels.shape[1:]), "labels": self.labels[index]}

    def subset(self, index: Tensor) -> ImageSet:
        """The images of `index` (int64, or a boolean mask), without copying any."""
        return replace(self, labels=self.labels[index], rows=self.rows[index])

    def loader(self, batch_size: int = 256, *, seed: int | None = None) -> DataLoader:
        """Batches in order, or shuffled anew in each epoch, starting from `seed`."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(
            _WholeBatches(self),
            batch_size,
            shuffle=seed is not None,
            generator=generator,
            collate_fn=_unchanged,
            num_workers=self.workers,
        )


class _WholeBatches(Dataset):
    """An `ImageSet` that a loader indexes once per batch instead of once per image."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, index: list[int]) -> dict[str, Tensor]:
        return self.images[index]


def _unchanged(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


@dataclass(frozen=True)
class KDData:
    """One data set of the knowledge-deletion benchmark."""

    name: str  # as given to `load_kd_data`
    class_names: tuple[str, ...]  # by class id
    # train, validation, test: `validation` is carved from the training data, to choose hyper-parameters on
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    channels: int  # of the images
    flip: bool  # whether a mirrored image belongs to the same class

    @property
    def image_size(self) -> int:
        return self.train.image_size

    def class_ids(self, classes: Sequence[str | int]) -> tuple[int, ...]:
        """Ids of classes given by name or id.

        Raises:
            `BenchmarkError`: for an unknown class, or one that is named twice.
        """
        ids = tuple(self.class_names.index(c) if c in self.class_names else c for c in classes)
        if unknown := [c for c in ids if c not in range(len(self.class_names))]:
            close = difflib.get_close_matches(str(unknown[0]), self.class_names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            known = ", ".join(self.class_names)
            raise BenchmarkError(f"{self.name} has no class {unknown[0]!r}.{hint} Its classes are {known}.")
        if len(set(ids)) != len(ids):
            raise BenchmarkError(f"The classes {list(classes)} name one of them twice. Name each class once.")
        return ids


@dataclass(frozen=True)
class Splits:
    """The images to forget and those that remain.

    Of the training data they are `f` and `r`, of the validation data `fv` and `rv`, of the test data `ft` and
    `rt`. Accuracies are named after them: `acc_f`, `acc_r`, `acc_ft`, `acc_rt`. `classes` are the numbers of
    the forgotten classes; there are none where samples of all classes are forgotten.
    """

    f: ImageSet
    r: ImageSet
    fv: ImageSet
    rv: ImageSet
    ft: ImageSet
    rt: ImageSet
    classes: tuple[int, ...] = ()


def split_by_class(data: KDData, forget: Sequence[str | int]) -> Splits:
    """Forget whole classes (appendix B.1).

    Raises:
        `BenchmarkError`: for an unknown class, and unless some classes are forgotten and some remain.
    """
    classes = data.class_ids(forget)
    ids = torch.tensor(classes, dtype=torch.int64)
    if not 0 < len(ids) < len(data.class_names):
        raise BenchmarkError(
            f"{len(ids)} of the {len(data.class_names)} classes of {data.name} are to be forgotten. "
            "Forget at least one class and leave at least one."
        )

    def divide(part: ImageSet) -> tuple[ImageSet, ImageSet]:
        forgotten = torch.isin(part.labels, ids)
        return part.subset(forgotten), part.subset(~forgotten)

    return Splits(*divide(data.train), *divide(data.validation), *divide(data.test), classes)


def split_by_sample(data: KDData, fraction: float = 0.1, *, seed: int = 0) -> Splits:
    """Forget a random fraction of the training images of all classes (section 4.3).

    `ft` and `fv` are empty; `rt` is the whole test set.
    """
    count = round(fraction * len(data.train))
    if not 0 < count < len(data.train):
        raise BenchmarkError(
            f"A fraction of {fraction} forgets {count} of {len(data.train)} images. "
            "Choose one between 0 and 1."
        )
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


def some_of_each(labels: Tensor, limit: int | None, *, seed: int = 0) -> Tensor:
    """Draw up to `limit` places of each of labels `(n,)`, in order; all without a limit."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    picks = [order[labels[order] == label][:limit] for label in labels.unique()]
    return torch.cat(picks).sort().values
