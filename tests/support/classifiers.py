"""Classifiers of Transformers that see 8x8 grey images as tokens, with random weights."""

import torch
from transformers import ViTConfig, ViTForImageClassification


def token_classifier(cls=ViTForImageClassification, config=ViTConfig, num_labels=10, **sizes):
    """Four patches, 16 numbers wide. Does not change the global random state."""
    options = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "id2label": {i: f"LABEL_{i}" for i in range(num_labels)},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config(**{**options, **sizes})).eval()
