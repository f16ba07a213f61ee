"""Asking more than once: the mean of several answers, the inversion of two, disagreement, shifted images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...classes.features import inputs_of, invert_two_queries
from ...classes.heads import linear_head
from ...classes.training import augment
from ...splits import ImageSet, some_of_each
from ..store import Result
from .victim import Part, Victim


QUERIES = "queries"


def queries(victim: Victim, *, asked: Sequence[int] = (1, 2, 4, 16, 64)) -> Iterator[Result]:
    """Fit a linear head on what several answers to the same image have in common.

    - `mean`: the mean of K features of each image. A layer that does not draw gives K times the same.
    - `two, unknown experts`: the mean of two features, and how far they are apart, which is how much of the
      forgotten is in the image.
    - `two, known experts`: the feature that two known experts determine (G7): the pseudo-inverse of both
      together. `error` is its distance from the original's, over the latter's norm, on forgotten test images.
    - `disagreement`: no head at all; the variance of an image's logits over K queries tells the forgotten
      from the others.

    Args:
        asked (`Sequence[int]`): the numbers of queries.
    """
    labels = victim.labels("train")
    for count in asked:
        if count == asked[0] or victim.cached.is_random:
            train, test = (victim.cached.features(part, passes=count) for part in ("train", "test"))
            logits = linear_head(train, labels, test)
        yield from victim.scores(logits, variant="mean", budget=count, unit=QUERIES)

    two = {"variant": "two, unknown experts", "budget": 2, "unit": QUERIES}
    if victim.cached.is_random:
        train, test = (_mean_and_distance(victim, part) for part in ("train", "test"))
        logits = linear_head(train, labels, test)
    yield from victim.scores(logits, **two)

    if victim.cached.routed is not None:
        two["variant"] = "two, known experts"
        train, test = (invert_two_queries(victim.cached, part) for part in ("train", "test"))
        yield from victim.scores(linear_head(train, labels, test), **two)
        original = victim.original.cached.inputs["test"][victim.forgotten("test")]
        error = (test[victim.forgotten("test")] - original).norm(dim=1) / original.norm(dim=1)
        yield Result(float(error.mean()), measure="error", **two)

    for count in asked[1:]:
        answers = [victim.cached.logits("test", draw=draw) for draw in range(count)]
        variance = torch.stack(answers).var(0).sum(-1)
        facts = {"variant": "disagreement", "budget": count, "unit": QUERIES}
        yield from victim.separation(variance, victim.labels("test"), **facts)


def _mean_and_distance(victim: Victim, part: Part) -> Tensor:
    first, second = (victim.cached.features(part, draw=draw) for draw in (0, 1))
    return torch.cat([(first + second) / 2, (first - second).norm(dim=1, keepdim=True)], dim=1)


def jitter(
    victim: Victim, *, copies: Sequence[int] = (1, 2, 4, 8), shift: int = 2, train: int = 100, test: int = 200
) -> Iterator[Result]:
    """Fit a linear head on mean features of shifted copies of each image.

    A router that gives an image the same expert whenever it comes may give a shifted copy another one.

    Args:
        copies (`Sequence[int]`): how many of each image; the first is the image itself.
        shift (`int`, defaults to 2): pixels that a copy is moved by, at most.
        train, test (`int`, defaults to 100 and 200): images of each class.
    """
    sides = {"train": train, "test": test}
    places = {part: some_of_each(victim.labels(part), count) for part, count in sides.items()}

    def embedded(part: Part) -> Tensor:
        images = victim.parts[part].subset(places[part])
        return torch.stack([_embed(victim, images, shift, copy) for copy in range(max(copies))])

    inputs = {
        part: victim.seen.remember(f"shifted {part}", lambda part=part: embedded(part)) for part in sides
    }
    flat = replace(victim.cached, inputs={part: z.flatten(0, 1) for part, z in inputs.items()})
    features = {part: flat.features(part).unflatten(0, z.shape[:2]) for part, z in inputs.items()}
    labels = victim.labels("train")[places["train"]]
    for count in copies:
        means = {part: z[:count].mean(0) for part, z in features.items()}
        logits = linear_head(means["train"], labels, means["test"])
        yield from victim.scores(logits, of=places["test"], variant="mean", budget=count, unit="copies")


@torch.no_grad()
def _embed(victim: Victim, images: ImageSet, shift: int, copy: int) -> Tensor:
    """What the head reads, before its hooks, of one copy of images."""
    model, generator = victim.cached.model, torch.Generator().manual_seed(copy)
    seen = []
    with inputs_of(victim.cached.head, before_hooks=True) as inputs:
        for batch in images.loader(100):
            pixels = batch["pixel_values"]
            if copy:
                pixels = augment(pixels, shift, False, generator, len(pixels), slice(None))
            inputs.clear()
            model(pixels.to(next(model.parameters()).device))
            seen.append(inputs[0].float().cpu())
    return torch.cat(seen)
