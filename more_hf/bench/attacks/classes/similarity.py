"""How far the features are from those of a classifier that never saw the class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from ...classes.heads import fit_perceptron
from ...classes.similarity import linear_cka
from ..result import Result
from .layers import block_features
from .victim import Part, Seen, Victim


def similarity(victim: Victim, *, hidden: int = 128, epochs: int = 20) -> Iterator[Result]:
    """Compare the features with Retrain's and with the original's; empty without Retrain.

    - `cka`: linear centred kernel alignment with Retrain's features, 1 for the same up to rotation.
    - `idi`: the information difference index (Jeon et al., arXiv 2405.17878), 0 for Retrain and 1 for the
      original: Σ max(0, I(Z; Y) − I_retrain(Z; Y)) over every block's output and what the head reads, over
      the same of the original. Y is whether an image is of a forgotten class. The paper estimates I with a
      contrastive critic; here it is the entropy of Y less a perceptron's cross-entropy on test images, a
      lower bound.
    - `information`: that I of what the head reads, in bits.

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
        return [information(z, victim, hidden=hidden, epochs=epochs) for z in features]

    retrained = victim.retrained.remember(("informed", names), lambda: informed(victim.retrained))
    original = victim.original.remember(("informed", names), lambda: informed(victim.original))
    own = informed(victim.seen)
    differences = []
    for bits in (own, original):
        differences.append(sum(max(0.0, a - b) for a, b in zip(bits, retrained, strict=True)))
    # Where Retrain's features tell as much as the original's, there is nothing to compare.
    index = differences[0] / differences[1] if differences[1] else None
    yield Result(index, measure="idi", variant="IDI")
    yield Result(own[-1], measure="bits", variant="information")


def information(features: Mapping[Part, Tensor], victim: Victim, *, hidden: int, epochs: int) -> float:
    """A lower bound of I(Z; Y) in bits, 0 at least: H(Y) less the cross-entropy of a perceptron on test
    images, fitted on the attacker's."""
    known, asked = (victim.forgotten(part).long() for part in ("train", "test"))
    train = features["train"]
    net = fit_perceptron(lambda epoch: train, known, 2, hidden=hidden, epochs=epochs, seed=0)
    share = asked.double().mean()
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    found = entropy - nn.functional.cross_entropy(net(features["test"]).double(), asked)
    return max(0.0, float(found) / math.log(2))
