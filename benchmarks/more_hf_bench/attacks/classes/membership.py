"""Whether single images of the forgotten class were in the training data: the likelihood-ratio attack."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...classes.features import cache
from ...classes.metrics import auc
from ...splits import ImageSet
from ..store import Result
from .victim import Victim


MODELS = "shadow models"


def membership(victim: Victim, *, shadows: int = 16) -> Iterator[Result]:
    """Tell training images of the forgotten classes from test images of the same (LiRA; Carlini et al.,
    arXiv 2112.03570).

    Shadow models are trained as the victim was, each on a half of the attacker's labelled and of the test
    images, so that half of them have seen an image. It costs that many trainings; empty where nothing is
    trained.

    - `auc_members`: the probability in percent that a training image scores above a test image.
    - `members found`: the percent of training images above the highest hundredth of test images.

    Args:
        shadows (`int`, defaults to 16): an even number of shadow models.
    """
    if victim.train is None:
        return
    inside, confidences = victim.original.remember("shadows", lambda: _train_shadows(victim, shadows))
    parts = ("train", "test")
    observed = [log_odds(victim.cached.logits(part), victim.labels(part)) for part in parts]
    score = likelihood_ratio(torch.cat(observed), confidences, inside)
    sides = score.split([len(part) for part in observed])
    members, others = (side[victim.forgotten(part)] for side, part in zip(sides, parts, strict=True))
    facts = {"variant": "LiRA", "budget": shadows, "unit": MODELS}
    yield Result(auc(members, others), measure="auc_members", **facts)
    found = int((members > others.quantile(0.99)).sum())
    yield Result.of_hits(found, len(members), measure="members found", **facts)


def likelihood_ratio(observed: Tensor, confidences: Tensor, inside: Tensor) -> Tensor:
    """log p(observed | seen) − log p(observed | unseen) of each image, `(n,)`.

    Both are normal distributions: an image's own mean over shadow models, one variance for all images, as the
    source does with few of them.

    Args:
        observed (`Tensor`): `(n,)`, log-odds of the right class in the victim.
        confidences (`Tensor`): `(shadows, n)`, the same in the shadow models.
        inside (`Tensor`): boolean `(shadows, n)`, whether a shadow model has seen an image.
    """
    log_p = []
    for seen in (inside, ~inside):
        mean = (confidences * seen).sum(0) / seen.sum(0)
        variance = ((confidences - mean).square() * seen).sum() / seen.sum()
        log_p.append(torch.distributions.Normal(mean, variance.sqrt()).log_prob(observed))
    return log_p[0] - log_p[1]


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log p/(1 − p) of the right class, float64 `(n,)`, from logits `(n, k)` and labels `(n,)`."""
    logits = logits.double()
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return own - others


def _train_shadows(victim: Victim, count: int) -> tuple[Tensor, Tensor]:
    """Which images each shadow model has seen, and its log-odds of all."""
    pool = _joined(victim.parts["train"], victim.parts["test"])
    generator, inside = torch.Generator().manual_seed(0), []
    # In pairs with complementary halves: exactly half of the models have seen an image.
    for _ in range(count // 2):
        half = torch.zeros(len(pool), dtype=torch.bool)
        half[torch.randperm(len(pool), generator=generator)[: len(pool) // 2]] = True
        inside += [half, ~half]
    confidences = []
    for i, seen in enumerate(inside):
        model = victim.train(pool.subset(seen), f"shadow{i}", i)
        head = model.get_submodule(victim.head)
        confidences.append(log_odds(cache(model, head, {"pool": pool}).logits("pool"), pool.labels))
    return torch.stack(inside), torch.stack(confidences)


def _joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """The images of both."""
    images = torch.cat([part.images[part.rows] for part in (first, second)])
    labels = torch.cat([first.labels, second.labels])
    return ImageSet(images, labels, torch.arange(len(labels)), first.image_size, first.mean, first.std)
