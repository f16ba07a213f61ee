"""New heads of every shape on the features that a classifier's head reads."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ...classes.heads import class_logits, fit_perceptron, linear_head, nearest_neighbours
from ...classes.probes import converged_probe, sgd_probes
from ..result import Result
from .victim import Victim


PAPER, PERCEPTRON = "linear, the paper's", "perceptron"  # the heads that draw their first weights


def probes(victim: Victim, *, neighbours: int = 5, hidden: int = 512, epochs: int = 30) -> Iterator[Result]:
    """Recognise classes from features with new heads, fitted on all the attacker's labelled images.

    A layer that draws is asked once for each test image. Heads that are trained in epochs read another draw
    of the labelled images in each.

    Args:
        neighbours (`int`, defaults to 5): of k-NN, by cosine.
        hidden (`int`, defaults to 512), epochs (`int`, defaults to 30): of the multilayer perceptron.
    """
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    train, test = victim.cached.features("train"), victim.cached.features("test")
    labels, k, seed = victim.labels("train"), victim.num_classes, victim.seed

    def drawn(epoch: int, seed: int = seed) -> Tensor:
        # Draw 0 is the one that heads are evaluated on.
        return victim.cached.features("train", draw=1 + epoch) if victim.cached.is_random else train

    def paper() -> Tensor:
        return sgd_probes(drawn, labels, k, learning_rates=(0.1,), seeds=(seed,))[0.1, seed](test)

    def perceptron() -> Tensor:
        return fit_perceptron(drawn, labels, k, hidden=hidden, epochs=epochs, seed=seed)(test)

    def quadratic() -> Tensor:
        model = QuadraticDiscriminantAnalysis(solver="eigen", shrinkage=0.1)
        return class_logits(model, train, labels, test)

    shapes = {
        PAPER: paper,
        "linear, converged": lambda: converged_probe(train, labels)(test),
        "k-NN": lambda: nearest_neighbours(train, labels, test, count=neighbours),
        PERCEPTRON: perceptron,
        "QDA": quadratic,
    }
    features = {"train": train, "test": test}
    for name, logits in shapes.items():
        key = name, seed if name in (PAPER, PERCEPTRON) else None
        yield from victim.scores(victim.once(key, features, logits), variant=name)

    # A linear head alone for the forgotten against all others, which no prior of the classes bends.
    score = linear_head(train, victim.forgotten("train").long(), test)
    yield from victim.separation(score, victim.labels("test"), variant="linear, one against rest")
