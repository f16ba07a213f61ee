"""The kinds of classifiers in Transformers: how each is opened, and how its processor reads samples."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from datasets import Audio, Image, Value, Video
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForVideoClassification,
    AutoTokenizer,
    AutoVideoProcessor,
    PreTrainedConfig,
)
from transformers.audio_utils import load_audio
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES as OF_SOUND
from transformers.video_utils import load_video

from ..core.errors import SiteNotFoundError


@dataclass(frozen=True)
class Kind:
    """One kind of classifier."""

    name: str  # of its samples
    word: str  # that the names of its classes hold
    auto: Any  # what opens a model
    processor: Any  # what opens its processor
    feature: Any  # what a data set of `datasets` holds, as stored
    task: str  # the Hub's name
    # samples as stored, the processor and the model's configuration give what the model is called with
    read: Callable[[Sequence[Any], Any, PreTrainedConfig], Mapping[str, Any]]
    packages: str  # what reads files, beside Transformers


def _images(pictures: Sequence[Any], processor: Any, config: PreTrainedConfig) -> Mapping[str, Any]:
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
    return processor([picture.convert(mode) for picture in pictures], return_tensors="pt")


def _videos(files: Sequence[Any], processor: Any, config: PreTrainedConfig) -> Mapping[str, Any]:
    """As many frames as the model takes, evenly from the whole film."""
    frames = getattr(config, "num_frames", None) or config.frames_per_clip
    films = [load_video(file["path"], num_frames=frames)[0] for file in files]
    return processor(films, return_tensors="pt")


def _sounds(files: Sequence[Any], processor: Any, config: PreTrainedConfig) -> Mapping[str, Any]:
    rate, waves = processor.sampling_rate, []
    for file in files:
        content = file["bytes"]  # of a data set that holds its files
        source = file["path"] if content is None else base64.b64encode(content).decode()
        waves.append(load_audio(source, sampling_rate=rate))
    return processor(waves, sampling_rate=rate, padding=True, return_tensors="pt")


def _texts(texts: Sequence[Any], processor: Any, config: PreTrainedConfig) -> Mapping[str, Any]:
    return processor(list(texts), padding=True, truncation=True, return_tensors="pt")


IMAGES = Kind(
    "images",
    "ForImageClassification",
    AutoModelForImageClassification,
    AutoImageProcessor,
    Image(),
    "image-classification",
    _images,
    "pillow",
)
VIDEOS = Kind(
    "videos",
    "ForVideoClassification",
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    Video(decode=False),
    "video-classification",
    _videos,
    "av",
)
SOUNDS = Kind(
    "sounds",
    "ForAudioClassification",
    AutoModelForAudioClassification,
    AutoFeatureExtractor,
    Audio(decode=False),
    "audio-classification",
    _sounds,
    "soundfile soxr",
)
TEXTS = Kind(
    "texts",
    "ForSequenceClassification",
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Value("string"),
    "text-classification",
    _texts,
    "",
)
KINDS = (IMAGES, VIDEOS, SOUNDS, TEXTS)


def find_kind(model_class: str) -> Kind | None:
    """The kind of a classifier of this class, by its name; `None` if that tells nothing."""
    if model_class in OF_SOUND.values():  # Wav2Vec2ForSequenceClassification
        return SOUNDS
    return next((kind for kind in KINDS if kind.word in model_class), None)


def kind_of(model_class: str) -> Kind:
    """As `find_kind`. Raises `SiteNotFoundError` where the name tells nothing."""
    kind = find_kind(model_class)
    if kind is None:
        raise SiteNotFoundError(
            f"By its name a {model_class} is no classifier of {', '.join(kind.name for kind in KINDS)}. Name "
            "a model whose configuration has one in `architectures`, or pass batches to "
            "`more_hf.erase_classes`."
        )
    return kind


def class_of(config: PreTrainedConfig) -> Any:
    """What opens the classifier that a configuration names: its class, or one of the auto classes."""
    # a repository of timm's names no class
    name = (config.architectures or ["TimmWrapperForImageClassification"])[0]
    return getattr(transformers, name, None) or (find_kind(name) or IMAGES).auto
