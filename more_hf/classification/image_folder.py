"""A folder of images, one sub-folder per class, as batches for a classifier."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader

from ..core.errors import PrototypeError
from .names import find_class


HELD_OUT = ("test", "validation", "train")  # the splits to measure on, the best one first

logger = logging.getLogger(__name__)


def load_image_folder(
    folder: str | os.PathLike,
    names: Sequence[str],
    processor: Callable[..., Any],
    *,
    channels: int = 3,
    batch_size: int = 32,
    splits: Sequence[str] = ("train",),
) -> DataLoader:
    """
    Load a folder of images as batches for a classifier.

    Args:
        folder (`str` or `os.PathLike`):
            In the layout of `datasets`' imagefolder, `folder/CLASS/*.png`, which is one split called `train`,
            or `folder/train/CLASS/*.png`, `folder/test/CLASS/*.png`, ...
        names (`Sequence[str]`):
            The model's classes. A sub-folder is called like a class, one of its synonyms, or its number.
        processor (`Callable`):
            The model's image processor.
        channels (`int`, *optional*, defaults to 3):
            1 for gray images.
        batch_size (`int`, *optional*, defaults to 32):
            Images in a batch.
        splits (`Sequence[str]`, *optional*, defaults to `("train",)`):
            The first of these that the folder has is read, as `datasets` calls it.

    Returns:
        `DataLoader`: batches of `pixel_values` `(batch, channels, height, width)` and `labels` `(batch,)`
        int64, the model's class numbers.

    Raises:
        `PrototypeError`: the folder has no sub-folders, or one is called like no class.

    Example:

        >>> from transformers import AutoImageProcessor
        >>> processor = AutoImageProcessor.from_pretrained("google/vit-base-patch16-224")  # doctest: +SKIP
        >>> loader = load_image_folder("pictures", ["cat", "dog"], processor)  # doctest: +SKIP
    """
    found = load_dataset("imagefolder", data_dir=str(folder))
    split = next((name for name in splits if name in found), None)
    if split is None:
        raise PrototypeError(
            f"{folder} has the splits {', '.join(found)}. It needs one of {', '.join(splits)}."
        )
    logger.info("Reading %d images in %s (split %r)", len(found[split]), folder, split)
    images = found[split]
    if "label" not in images.features:
        raise PrototypeError(
            f"{folder} has images without labels. Put the images of each class into a folder with the "
            "class's name."
        )
    numbers = [names.index(find_class(names, name)) for name in images.features["label"].names]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = [row["image"].convert("L" if channels == 1 else "RGB") for row in rows]
        labels = torch.tensor([numbers[row["label"]] for row in rows])
        return {"pixel_values": processor(pictures, return_tensors="pt")["pixel_values"], "labels": labels}

    return DataLoader(images, batch_size=batch_size, collate_fn=collate)
