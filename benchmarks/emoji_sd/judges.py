"""Judges of artist and thing: AlexNet features and linear classifiers trained on real images only.

A judge never saw what it judges: artists are judged by a classifier fit on other things, things by one fit on
other artists.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from more_hf.tuning.judge import pooled_features


THING_FOLDS = 4


def fit(features: np.ndarray, labels: np.ndarray, alpha: float):
    """Standardised features and a ridge classifier: exact, without a seed, every class weighing the same."""
    return make_pipeline(StandardScaler(), RidgeClassifier(alpha=alpha, class_weight="balanced")).fit(
        features, labels
    )


class Judges:
    """
    judge(features, artists, things) -> what each image is taken for, by a judge that never saw its like.
    """

    def __init__(self, data, lpips_model: torch.nn.Module, cache: Path, min_artists: int = 8):
        """
        `cache` is a .npy file for the real images' features, which take minutes; written if out of date.
        """
        self.data, self.lpips_model = data, lpips_model
        self.features = np.load(cache) if cache.exists() else np.empty((0, 0))
        if len(self.features) != len(data.images):
            self.features = self.describe(data.pixels(torch.arange(len(data.images))))
            np.save(cache, self.features)
        artist, thing, chosen = data.artist.numpy(), data.thing.numpy(), data.chosen.numpy()
        # Names that few artists drew would tell the judge that the artist is one of those few.
        names = data.name.numpy()
        common = np.bincount(names)[names] >= min(min_artists, len(data.artists))
        self.by_fold, self.by_artist = [], []
        for fold in range(THING_FOLDS):
            rows = (common & ~chosen) | (chosen & (thing % THING_FOLDS != fold))
            self.by_fold.append(fit(self.features[rows], artist[rows], alpha=300.0))
        for a in range(len(data.artists)):
            rows = chosen & (artist != a)
            self.by_artist.append(fit(self.features[rows], thing[rows], alpha=300.0))

    def describe(self, images: torch.Tensor) -> np.ndarray:
        """(n, 3456) float32 features of images (n, 3, 64, 64) in [-1, 1]."""
        return pooled_features(self.lpips_model, images).numpy()

    def judge(
        self, features: np.ndarray, artists: np.ndarray, things: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(judged artist, judged thing), each (n,) int64; `artists` and `things` say what was asked for."""
        judged_artist, judged_thing = np.empty(len(features), int), np.empty(len(features), int)
        for fold, model in enumerate(self.by_fold):
            rows = things % THING_FOLDS == fold
            if rows.any():
                judged_artist[rows] = model.predict(features[rows])
        for a, model in enumerate(self.by_artist):
            rows = artists == a
            if rows.any():
                judged_thing[rows] = model.predict(features[rows])
        return judged_artist, judged_thing
