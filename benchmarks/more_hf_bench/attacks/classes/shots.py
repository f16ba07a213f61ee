"""A few images of the forgotten class: a new class mean, a fine-tuned head, fine-tuned weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from more_hf.classification.heads import evaluating, logits_of

from ...classes.metrics import class_means
from ...splits import some_of_each
from ..store import Result
from .victim import REMAINING, Victim


IMAGES, STEPS = "images", "steps"


def shots(
    victim: Victim,
    *,
    counts: Sequence[int] = (1, 5, 10, 50),
    steps: int = 100,
    learning_rate: float = 1e-2,
    batch_size: int = 64,
) -> Iterator[Result]:
    """Recognise from a few forgotten images beside the attacker's others, without touching the backbone.

    - `class mean`: the class whose mean feature is nearest (prototypical relearning).
    - `head`: the classifier's own head goes on learning.

    Args:
        counts (`Sequence[int]`): images of each forgotten class.
        steps (`int`, defaults to 100), learning_rate (`float`, defaults to 0.01), batch_size (`int`, defaults
            to 64): of the head's training with Adam, on batches in which every class is equally likely.
    """
    test = victim.cached.features("test")
    # A layer that draws is asked again now and then.
    draws = [victim.cached.features("train", draw=1 + i) for i in range(8 if victim.cached.is_random else 1)]
    for count in counts:
        rows = few_shot_rows(victim, count)
        labels = victim.labels("train")[rows]
        means = class_means(draws[0][rows], labels, victim.num_classes).float()
        logits = -torch.cdist(test, means)
        yield from victim.scores(logits, variant="class mean", budget=count, unit=IMAGES)

        head = victim.cached.head
        weight = head.weight.detach().cpu().clone().requires_grad_()
        bias = head.bias.detach().cpu().clone().requires_grad_()
        optimizer = torch.optim.Adam([weight, bias], learning_rate)
        for step, picked in enumerate(balanced_batches(labels, steps, batch_size, victim.seed)):
            z = draws[step % len(draws)][rows[picked]]
            nn.functional.cross_entropy(z @ weight.T + bias, labels[picked]).backward()
            optimizer.step()
            optimizer.zero_grad()
        logits = (test @ weight.T + bias).detach()
        yield from victim.scores(logits, variant="head", budget=count, unit=IMAGES)


def fine_tuning(
    victim: Victim,
    *,
    counts: Sequence[int] = (0, 5, 50, 500),
    steps: Sequence[int] = (0, 1, 2, 5, 10, 20, 50, 100),
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    test: int = 300,
    runs: int = 1,
) -> Iterator[Result]:
    """Let all weights go on learning, from a few forgotten images beside the attacker's others.

    With `edit kept` the hooks of the head stay where they are, and the backbone learns to get around them;
    with `edit removed` the attacker has taken them off. Each also says after how many steps the forgotten
    are recognised half as often as by the original, and nine tenths as often.

    Args:
        counts (`Sequence[int]`): images of each forgotten class; 0 for remaining images alone.
        steps (`Sequence[int]`): when the forgotten test images are looked at.
        learning_rate (`float`, defaults to 1e-3), batch_size (`int`, defaults to 64): of AdamW, on batches in
            which every class is equally likely.
        test (`int`, defaults to 300): test images of each class that are looked at.
        runs (`int`, defaults to 1): how many of a method's runs are attacked: the first ones.
    """
    if victim.seed >= runs:
        return
    model, head = victim.cached.model, victim.cached.head
    forgotten, labels = victim.forgotten("test"), victim.labels("test")
    right = victim.original.cached.logits("test").argmax(-1) == labels
    whole = 100 * right[forgotten].double().mean().item()
    shown = some_of_each(labels, test)
    own, others = shown[forgotten[shown]], shown[~forgotten[shown]]
    for count in counts:
        rows = few_shot_rows(victim, count)
        batches = balanced_batches(victim.labels("train")[rows], max(steps), batch_size, victim.seed)
        images = [victim.parts["train"].subset(rows)[picked] for picked in batches]
        for variant in ("edit kept", "edit removed"):
            facts = {"variant": f"{variant}, {count} images", "unit": STEPS}
            # Where there is no hook to remove, both are the same training.
            if variant == "edit kept" or head._forward_pre_hooks:
                with weights_kept(model), unhooked(head) if variant == "edit removed" else nullcontext():
                    curve = {}
                    if victim.cached.routed is not None:
                        # A router's draws do not depend on what was asked before.
                        victim.cached.routed.hook.router.reset(range(batch_size))
                    for step in _train(model, images, steps, learning_rate):
                        curve[step] = _hits(victim, own)
                    kept = _hits(victim, others)
            for step, hits in curve.items():
                yield Result.of_hits(hits, len(own), budget=step, **facts)
            yield Result.of_hits(kept, len(others), measure=REMAINING, budget=max(steps), **facts)
            for part in (0.5, 0.9):
                reached = [step for step, hits in curve.items() if 100 * hits / len(own) >= part * whole]
                first = reached[0] if reached else None
                yield Result(first, measure=f"steps to {part:.0%}", variant=facts["variant"])


def _train(
    model: nn.Module, images: Sequence[Mapping[str, Tensor]], steps: Sequence[int], rate: float
) -> Iterator[int]:
    """Train on one batch a step, and pause after each of `steps`, in evaluation mode."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for step, batch in enumerate([*images, None]):
        if step in steps:
            yield step
        if batch is not None:
            model.train()
            logits = logits_of(model(batch["pixel_values"].to(device)))
            nn.functional.cross_entropy(logits, batch["labels"].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()


def _hits(victim: Victim, places: Tensor) -> int:
    """How many of these test images the classifier recognises."""
    model, images = victim.cached.model, victim.parts["test"].subset(places)
    device = next(model.parameters()).device
    with evaluating(model):
        logits = [logits_of(model(batch["pixel_values"].to(device))) for batch in images.loader(100)]
    return int((torch.cat(logits).argmax(-1).cpu() == images.labels).sum())


def few_shot_rows(victim: Victim, count: int) -> Tensor:
    """Places of the attacker's remaining images, and of up to `count` of each forgotten class."""
    forgotten = victim.forgotten("train")
    own = forgotten.nonzero()[:, 0]
    few = own[some_of_each(victim.labels("train")[own], count, seed=victim.seed)]
    return torch.cat([(~forgotten).nonzero()[:, 0], few])


def balanced_batches(labels: Tensor, steps: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Draw batches of places in labels `(n,)`, in which every class that there is is equally likely."""
    weights = 1 / torch.bincount(labels)[labels]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.multinomial(weights, batch_size, replacement=True, generator=generator)


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Put parameters and buffers back afterwards."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)


@contextmanager
def unhooked(head: nn.Module) -> Iterator[None]:
    """Take the hooks of a head's input off inside the block."""
    hooks = dict(head._forward_pre_hooks)
    head._forward_pre_hooks.clear()
    try:
        yield
    finally:
        head._forward_pre_hooks.update(hooks)
