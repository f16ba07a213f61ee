"""A folder of files, or a data set of `datasets`, as batches for a classifier."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..core.errors import MoreError, PrototypeError
from .kinds import IMAGES, TEXTS, Kind, kind_of
from .names import class_names, find_class


HELD_OUT = ("test", "validation", "train")  # the splits to measure on, the best one first
TABLES = (".csv", ".json", ".jsonl", ".parquet", ".arrow")
LABELS = ("label", "labels")  # columns with the classes, the preferred ones first
TEXT = ("text", "sentence")

logger = logging.getLogger(__name__)


def load_samples(
    data: str | os.PathLike | Dataset,
    model: PreTrainedModel,
    processor: Any,
    *,
    batch_size: int = 32,
    splits: Sequence[str] = ("train",),
) -> DataLoader:
    """
    Load images, videos, sounds or texts as batches for a classifier, as its processor gives them.

    Args:
        data (`str`, `os.PathLike` or `datasets.Dataset`):
            A folder `data/CLASS/*` of files, which is one split called `train`, or `data/train/CLASS/*`,
            `data/test/CLASS/*`, ...: pictures, films, sounds or `.txt`. Or whatever `datasets.load_dataset`
            opens (`.csv`, `.jsonl` and `.parquet` in a folder, a Hub id), what its `save_to_disk` wrote, or a
            data set itself, with a column `label`.
        model (`PreTrainedModel`):
            The classifier. A folder or label is called like one of its classes, like a synonym, or like its
            number.
        processor (`Callable`):
            The model's image or video processor, feature extractor or tokenizer.
        batch_size (`int`, *optional*, defaults to 32):
            Samples in a batch.
        splits (`Sequence[str]`, *optional*, defaults to `("train",)`):
            The first of these that there is is read.

    Returns:
        `DataLoader`: batches of what the processor gives and `labels` `(batch,)` int64, the model's class
        numbers.

    Raises:
        `PrototypeError`: there are no labels, or one is no class. `MoreError`: a package that reads such
        files is not installed.

    Example:

        >>> from transformers import AutoImageProcessor
        >>> processor = AutoImageProcessor.from_pretrained("google/vit-base-patch16-224")  # doctest: +SKIP
        >>> loader = load_samples("pictures", model, processor)  # doctest: +SKIP
    """
    kind, names = kind_of(type(model).__name__), class_names(model, model.config.num_labels)
    samples = data if isinstance(data, Dataset) else _read(data, kind, splits)
    label = _labels_of(samples, kind)
    column = _samples_of(samples, label, kind)
    samples = samples.cast_column(column, kind.feature)
    numbers = _numbers(samples, label, names)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            inputs = kind.read([row[column] for row in rows], processor, model.config)
        except ImportError as error:
            needed = f"pip install {kind.packages}"
            raise MoreError(f"The {kind.name} cannot be read: {error} Install a reader: {needed}") from error
        labels = [numbers.get(row[label], row[label]) for row in rows]
        return {**inputs, "labels": torch.tensor(labels)}

    return DataLoader(samples, batch_size=batch_size, collate_fn=collate)


def _read(data: str | os.PathLike, kind: Kind, splits: Sequence[str]) -> Dataset:
    """The first of the splits that a folder or a repository has."""
    folder = Path(data)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        loaded = load_from_disk(str(data))
        found: Mapping[str, Dataset] = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    elif kind is not IMAGES and any(file.suffix not in TABLES for file in folder.glob("*/**/*.*")):
        found = _files(folder, kind)
    else:
        found = load_dataset(str(data))
    split = next((name for name in splits if name in found), None)
    if split is None:
        raise PrototypeError(
            f"{data} has the splits {', '.join(found)}. It needs one of {', '.join(splits)}."
        )
    logger.info("Reading %d %s in %s (split %r)", len(found[split]), kind.name, data, split)
    return found[split]


def _files(folder: Path, kind: Kind) -> dict[str, Dataset]:
    """
    `CLASS/*` as the split `train`, or `SPLIT/CLASS/*`.

    `datasets` itself gives texts no labels, and takes sounds and films only where it can decode them.
    """
    parts = {split: folder / split for split in HELD_OUT if (folder / split).is_dir()}
    splits = {}
    for split, place in (parts or {"train": folder}).items():
        files = sorted(file for file in place.glob("*/*") if not file.name.startswith("."))
        classes = [file.parent.name for file in files]
        samples = [file.read_text("utf-8") if kind is TEXTS else str(file) for file in files]
        label = ClassLabel(names=sorted(set(classes)))
        features = Features({"sample": Value("string"), "label": label})
        splits[split] = Dataset.from_dict({"sample": samples, "label": classes}, features, split=split)
        splits[split] = splits[split].cast_column("sample", kind.feature)
    return splits


def _labels_of(samples: Dataset, kind: Kind) -> str:
    """The column that has the classes."""
    features = samples.features
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    for name in (*LABELS, *classes[: len(classes) == 1]):
        if name in features:
            return name
    raise PrototypeError(
        f"The data has {kind.name} without labels: its columns are {', '.join(features)}. Put the "
        f"{kind.name} of each class into a folder with the class's name, or name the column `label`."
    )


def _samples_of(samples: Dataset, label: str, kind: Kind) -> str:
    """The column that has the samples: the only one of its type, or of several texts the usual one."""
    of_type = [
        name
        for name, feature in samples.features.items()
        if name != label
        and type(feature) is type(kind.feature)
        and (kind is not TEXTS or feature.dtype.endswith("string"))
    ]
    for name in (*(TEXT if kind is TEXTS else ()), *of_type[: len(of_type) == 1]):
        if name in of_type:
            return name
    raise PrototypeError(
        f"The data has {len(of_type)} columns of {kind.name} among {', '.join(samples.features)}, and the "
        "model reads one. Pass a data set with that one alone (`select_columns`)."
    )


def _numbers(samples: Dataset, label: str, names: Sequence[str]) -> dict[Any, int]:
    """The class number of each label that is not one itself."""
    feature = samples.features[label]
    if isinstance(feature, ClassLabel):
        return {i: names.index(find_class(names, name)) for i, name in enumerate(feature.names)}
    if feature.dtype.endswith("string"):
        return {name: names.index(find_class(names, name)) for name in samples.unique(label)}
    return {}
