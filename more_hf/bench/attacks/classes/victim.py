"""A classifier that forgot classes, and what its attackers have beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...classes.features import Cached
from ...splits import ImageSet
from ..result import RECOGNISED, Result


REMAINING = "remaining"
"""The measure of what an attack costs: the percent of the other test samples that it recognises."""


@dataclass(frozen=True)
class Victim:
    """A classifier under attack.

    Attributes:
        cached (`Cached`): the classifier, its head, and what the head reads of `parts`.
        original (`Cached`), retrained (`Cached`, *optional*): the same of the original, and of Retrain.
        parts (`Mapping[str, ImageSet]`): `"train"`, the labelled images that the attacker has, of all
            classes; `"test"`, all test images.
        forget, targets (`Sequence[int]`): ids of the forgotten classes, and of those that they were sent to.
        seed (`int`): of the attack.
    """

    cached: Cached
    original: Cached
    retrained: Cached | None
    parts: Mapping[str, ImageSet]
    forget: Sequence[int]
    targets: Sequence[int]
    seed: int

    def labels(self, part: Literal["train", "test"]) -> Tensor:
        """The labels `(n,)` of a part's images."""
        return self.parts[part].labels

    def forgotten(self, part: Literal["train", "test"]) -> Tensor:
        """Which of a part's images are of a forgotten class, boolean `(n,)`."""
        return torch.isin(self.labels(part), torch.tensor(list(self.forget)))

    def scores(self, predicted: Tensor, **facts: Any) -> list[Result]:
        """The percent of the forgotten and of the remaining test images whose predicted class is right.

        Args:
            predicted (`Tensor`): int64 `(m,)`, the classes of all test images.
            facts: the other fields of the results.
        """
        right, forgotten = predicted == self.labels("test"), self.forgotten("test")
        return [
            Result.of_hits(int(right[of].sum()), int(of.sum()), measure=measure, **facts)
            for measure, of in ((RECOGNISED, forgotten), (REMAINING, ~forgotten))
        ]
