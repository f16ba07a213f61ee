"""Tiny classifiers of Transformers with random weights: of 8x8 grey images, of text, sound and video."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def token_classifier(cls=ViTForImageClassification, config=ViTConfig, num_labels=10, **sizes):
    """Four patches, 16 numbers wide. Does not change the global random state."""
    options = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        **TINY,
        "id2label": {i: f"LABEL_{i}" for i in range(num_labels)},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config(**{**options, **sizes})).eval()


def text_classifier(cls=BertForSequenceClassification, config=BertConfig, **options):
    return cls(config(**{**TINY, "vocab_size": 50, "pad_token_id": 0, **options}))


def sound_classifier(**options):
    small = {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (4,), "num_conv_pos_embeddings": 4}
    small |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**{**TINY, **small, **options}))


def video_classifier(**options):
    """Two frames of 8x8."""
    small = {"image_size": 8, "patch_size": 4, "num_frames": 2}
    return VideoMAEForVideoClassification(VideoMAEConfig(**{**TINY, **small, **options}))
