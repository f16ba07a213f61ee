"""New heads of every shape on the features that a classifier's head reads."""

from __future__ import annotations

from collections.abc import Iterator

from ...classes.probes import converged_probe
from ..result import Result
from .victim import Victim


def probes(victim: Victim, *, neighbours: int = 5) -> Iterator[Result]:
    """Recognise classes from features with new heads, fitted on all the attacker's labelled images.

    Args:
        neighbours (`int`, defaults to 5): k of k-NN, by cosine.
    """
    from sklearn.neighbors import KNeighborsClassifier

    train, test = (victim.cached.features(part) for part in ("train", "test"))
    labels = victim.labels("train")
    linear = converged_probe(train, labels)
    yield from victim.scores(linear(test).argmax(-1), variant="linear")
    nearest = KNeighborsClassifier(neighbours, metric="cosine").fit(train.numpy(), labels.numpy())
    yield from victim.scores(labels.new_tensor(nearest.predict(test.numpy())), variant="k-NN")
