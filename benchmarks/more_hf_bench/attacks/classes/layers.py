"""Before the edit: heads on every block's output, on features without the hook, on features mapped back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...classes import information
from ...classes.heads import linear_head
from ...splits import ImageSet
from ..result import Result
from .victim import Part, Seen, Victim


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
    """Every block's output, as `information.block_features` has it, found once for each backbone."""
    return seen.remember("blocks", lambda: information.block_features(seen.cached.model, parts))
