"""How far the features are from those of a classifier that never saw the class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from ...classes.information import EPOCHS, HIDDEN, difference_index, information
from ...classes.similarity import linear_cka
from ..result import Result
from .layers import block_features
from .victim import Part, Seen, Victim


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
