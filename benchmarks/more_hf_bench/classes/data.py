"""The data sets of the knowledge-deletion benchmark.

Digits need no network, nor does Fashion-MNIST where Debian's package dataset-fashion-mnist is installed.
Otherwise it comes as the others do, through the `datasets` library: from the Hub, or from a local copy with
the same columns. Any other name is the path of a folder of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BenchmarkError
from ..splits import Images, ImageSet, KDData
from .sources import SOURCES, from_folder, stratified


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
    workers: int = 0,
) -> KDData:
    """Load a data set and carve the validation split from its training data.

    Args:
        name (`str`): `"digits"`, `"fashion-mnist"`, `"fashion-mnist-6000"` (its first 6,000 training images,
            to be learnt by heart), `"emoji-100"`, `"cifar10"`, `"cifar100"`, `"tiny-imagenet"`,
            `"imagenet-1k"`, or the path of a folder of images, `train/CLASS/*.png` and `test/CLASS/*.png`.
        path (`str` or `Path`, *optional*): a folder with the files or columns that the Hub's data set has, if
            the data are not in their usual place. `"emoji-100"` always needs the folder that
            `benchmarks/emoji_sd/data.py` wrote.
        image_size (`int`, *optional*): resize to this height and width; the data's own by default (224 for
            ImageNet and for a folder).
        channels (`int`, *optional*): 3 repeats grey images, for a model that reads colour.
        mean, std (`Sequence[float]`): of the normalisation, one number or one per channel; by default pixels
            lie in [−1, 1].
        validation (`float`, defaults to 0.1): fraction of each class's training images that becomes
            `validation`.
        seed (`int`, defaults to 0): of the validation split.
        workers (`int`, defaults to 0): processes that decode images, where they are not in memory.

    Returns:
        `KDData`: on the CPU. ImageNet and folders are decoded when they are read, all others are in memory.

    Raises:
        `BenchmarkError`: for an unknown name, a missing folder, a data set without test images, or digits
            without scikit-learn, which the extra `bench` installs.
    """
    if name in SOURCES:
        raw = SOURCES[name](None if path is None else Path(path), image_size)
    elif Path(name).is_dir():
        raw = from_folder(Path(name), image_size)
    else:
        raise BenchmarkError(
            f"There is no data set {name!r}, nor a folder of that name. "
            f"There are {', '.join(SOURCES)}, and any folder of images."
        )
    repeat = raw.channels == 1 and channels == 3
    if channels not in (None, raw.channels) and not repeat:
        raise BenchmarkError(
            f"The images of {name} have {raw.channels} channels, not {channels}. "
            "Only grey images can be given three. Take a model or a data set with the same number."
        )

    def image_set(images: Images, labels: Tensor) -> ImageSet:
        # Grey data sets are tensors, all of them in memory.
        images = images.expand(-1, 3, -1, -1) if repeat else images
        size = image_size or images.shape[-1]
        decoders = 0 if isinstance(images, Tensor) else workers
        return ImageSet(images, labels, torch.arange(len(labels)), size, tuple(mean), tuple(std), decoders)

    train, test = image_set(*raw.train), image_set(*raw.test)
    held_out = stratified(train.labels, validation, seed)
    return KDData(
        name=name,
        class_names=raw.class_names,
        train=train.subset(~held_out),
        validation=train.subset(held_out),
        test=test,
        channels=channels or raw.channels,
        flip=raw.flip,
    )
