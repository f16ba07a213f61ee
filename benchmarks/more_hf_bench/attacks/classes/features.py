"""What the features still show: to new heads, on the blocks before, mapped back, beside Retrain's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...classes.heads import (
    EPOCHS,
    HIDDEN,
    class_logits,
    difference_index,
    fit_perceptron,
    information,
    linear_head,
    nearest_neighbours,
)
from ...classes.heads import block_features as read_blocks
from ...classes.metrics import linear_cka
from ...classes.probes import converged_probe, sgd_probes
from ...splits import ImageSet
from ..store import Result
from .victim import Part, Seen, Victim


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


def layers(victim: Victim) -> Iterator[Result]:
    """Fit a linear head on the mean output of every block, and on what the head's hooks read."""
    labels = victim.labels("train")
    blocks = block_features(victim.seen, victim.parts)
    # Heads of all classes depend on the backbone alone, whatever is forgotten.
    for i, z in enumerate(blocks):
        logits = victim.seen.remember(f"layer {i}", lambda z=z: linear_head(z["train"], labels, z["test"]))
        yield from victim.scores(logits, variant="after a block", budget=i + 1, unit="blocks")
    z = victim.cached.inputs
    logits = victim.seen.remember("layer -1", lambda: linear_head(z["train"], labels, z["test"]))
    yield from victim.scores(logits, variant="without the hook")


def ridge(victim: Victim, *, asked: Sequence[int] = (1, 16), penalty: float = 1e-3) -> Iterator[Result]:
    """Map features back to the original's by ridge regression on remaining images, and ask its old head.

    It needs no forgotten image, but the original's features of the remaining ones.

    Args:
        asked (`Sequence[int]`): how many answers the features are means of.
        penalty (`float`, defaults to 1e-3): in units of the features' mean variance.
    """
    from sklearn.linear_model import Ridge

    kept, head = ~victim.forgotten("train"), victim.original.cached.head
    before = victim.original.cached.inputs["train"][kept].double()
    for count in asked:
        train, test = (victim.cached.features(part, passes=count).double() for part in ("train", "test"))
        alpha = penalty * float(train[kept].var(0).mean()) * int(kept.sum())
        mapped = Ridge(alpha).fit(train[kept].numpy(), before.numpy()).predict(test.numpy())
        features = torch.from_numpy(mapped).to(head.weight)
        logits = nn.functional.linear(features, head.weight, head.bias).detach().cpu()
        yield from victim.scores(logits, variant="ridge map", budget=count, unit="queries")


def block_features(seen: Seen, parts: Mapping[Part, ImageSet]) -> list[dict[Part, Tensor]]:
    """Every block's output, as `classes.information` has it, found once for each backbone."""
    return seen.remember("blocks", lambda: read_blocks(seen.cached.model, parts))


def similarity(victim: Victim, *, hidden: int = HIDDEN, epochs: int = EPOCHS) -> Iterator[Result]:
    """Compare the features with Retrain's and with the original's; empty without Retrain.

    - `cka`: linear centred kernel alignment with Retrain's features, 1 for the same up to rotation.
    - `idi`: the information difference index, 0 for Retrain and 1 for the original (`difference_index`).
    - `information`: the information in what the head reads, in bits.

    Args:
        hidden (`int`, defaults to 128), epochs (`int`, defaults to 20): of the perceptrons.
    """
    if victim.retrained is None:
        return
    forgotten, names = victim.forgotten("test"), tuple(victim.forget)
    theirs, ours = (seen.cached.features("test") for seen in (victim.retrained, victim.seen))
    for variant, group in (("CKA, forgotten", forgotten), ("CKA, remaining", ~forgotten)):
        yield Result(linear_cka(ours[group], theirs[group]), measure="cka", variant=variant)

    def informed(seen: Seen) -> list[float]:
        """The information in every block, which is the backbone's alone, and in what the head reads."""
        blocks = seen.remember(("information", names), lambda: each(block_features(seen, victim.parts)))
        return [*blocks, *each([{part: seen.cached.features(part) for part in ("train", "test")}])]

    def each(features: Iterable[Mapping[Part, Tensor]]) -> list[float]:
        who = {part: victim.forgotten(part) for part in ("train", "test")}
        return [information(z, who, hidden=hidden, epochs=epochs) for z in features]

    retrained = victim.retrained.remember(("informed", names), lambda: informed(victim.retrained))
    original = victim.original.remember(("informed", names), lambda: informed(victim.original))
    own = informed(victim.seen)
    yield Result(difference_index(own, original, retrained), measure="idi", variant="IDI")
    yield Result(own[-1], measure="bits", variant="information")
