"""A classifier that forgot classes, and what its attackers have beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...classes.features import Cached
from ...classes.metrics import auc
from ...classes.probes import RESOLUTION
from ...splits import ImageSet
from ..store import AUC, RECOGNISED, Result


REMAINING = "remaining"
"""The measure of what an attack costs: the percent of the other test images that are still recognised."""

AUC_TARGET = "auc_target"
"""As `AUC`, but beside images of the classes that the forgotten were sent to."""

Part = Literal["train", "test"]


@dataclass(frozen=True)
class Seen:
    """A classifier, and what attacks have found out about its backbone."""

    cached: Cached  # the classifier, its head, and what the head reads of the victim's `parts`
    # results that depend on the backbone alone, shared by all classifiers that have it
    memory: dict[Any, Any] = field(default_factory=dict)

    def remember(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` returned when it was first asked for under this key."""
        if key not in self.memory:
            self.memory[key] = compute()
        return self.memory[key]


@dataclass(frozen=True)
class Victim:
    """A classifier under attack."""

    seen: Seen  # the classifier
    original: Seen  # what it was before
    retrained: Seen | None  # Retrain, if it was trained
    head: str  # the name of the head in all of them
    # `"train"`, the labelled images that the attacker has, of all classes; `"test"`, all test images
    parts: Mapping[str, ImageSet]
    # forget, targets: ids of the forgotten classes, and of those that they were sent to
    forget: Sequence[int]
    targets: Sequence[int]
    # trains another classifier of the same kind, from images, a name for its folder, and a seed. `None` where
    # nothing is to be trained.
    train: Callable[[ImageSet, str, int], nn.Module] | None
    seed: int  # of the attack

    @property
    def cached(self) -> Cached:
        return self.seen.cached

    @property
    def num_classes(self) -> int:
        return self.cached.head.out_features

    def labels(self, part: Part) -> Tensor:
        """The labels `(n,)` of a part's images."""
        return self.parts[part].labels

    def forgotten(self, part: Part) -> Tensor:
        """Which of a part's images are of a forgotten class, boolean `(n,)`."""
        return torch.isin(self.labels(part), torch.tensor(list(self.forget)))

    def once(self, key: Any, features: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` makes of these features and of all labels alone.

        Where they are the backbone's own, as without a hook, it is computed once for all classifiers with
        this backbone.
        """
        own = all(torch.equal(z, self.cached.inputs[part]) for part, z in features.items())
        return self.seen.remember(key, compute) if own else compute()

    def scores(self, logits: Tensor, of: Tensor | None = None, **facts: Any) -> list[Result]:
        """What logits say about test images: who is recognised, and who can be told apart.

        Where several classes share the first place, as classes that a remap made one do, an image is
        recognised in the share that its own has in them: no accident of rounding decides.

        Args:
            logits (`Tensor`): `(m, k)`, of all test images or of those that `of` picks.
            of (`Tensor`, *optional*): their places among all test images.
            facts: the other fields of the results.
        """
        labels = self.labels("test") if of is None else self.labels("test")[of]
        forget = torch.tensor(list(self.forget))
        first = logits >= logits.amax(-1, keepdim=True) - RESOLUTION
        share = first[torch.arange(len(labels)), labels] / first.sum(-1)
        forgotten = torch.isin(labels, forget)
        results = [
            Result.of_hits(float(share[group].sum()), int(group.sum()), measure=measure, **facts)
            for measure, group in ((RECOGNISED, forgotten), (REMAINING, ~forgotten))
        ]
        rest = torch.tensor([c for c in range(self.num_classes) if c not in self.forget])
        score = logits[:, forget].double().logsumexp(-1) - logits[:, rest].double().logsumexp(-1)
        return [*results, *self.separation(score, labels, **facts)]

    def separation(self, score: Tensor, labels: Tensor, **facts: Any) -> list[Result]:
        """How well a score `(m,)` tells forgotten test images from the others, and from their targets'."""
        forgotten = torch.isin(labels, torch.tensor(list(self.forget)))
        sent = torch.isin(labels, torch.tensor(list(self.targets)))
        return [
            Result(auc(score[forgotten], score[others], resolution=RESOLUTION), measure=measure, **facts)
            for measure, others in ((AUC, ~forgotten), (AUC_TARGET, sent))
            if others.any()
        ]
