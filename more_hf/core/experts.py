"""Draw the target of each forgotten concept in each expert."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest

import torch

from .errors import PrototypeError


def draw_experts(
    options: Sequence[Sequence[str | None]], num_experts: int | None, *, max_distinct: int, seed: int = 0
) -> list[list[str | None]]:
    """
    Draw each concept's target in each expert: all its options once, in random order, then again.

    Args:
        options (`Sequence[Sequence[str | None]]`):
            For each concept, the names it may be sent to; `[None]` erases it.
        num_experts (`int`, *optional*):
            Number of experts. `None` takes the fewest that use every option of every concept equally often,
            so that the mean expert sends a concept to the plain mean of its options.
        max_distinct (`int`):
            The largest number of different targets. Beyond it, experts share targets.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order of the options.

    Returns:
        `list[list[str | None]]`: for each expert, one target per concept.

    Raises:
        `PrototypeError`: `max_distinct` is too small to give every concept a target.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = []
    for names in options:
        order = torch.randperm(len(names), generator=generator)
        shuffled.append([names[i] for i in order])

    # 1. Give each concept one target by a greedy cover: allow the option that most of the concepts without a
    # target share, until every concept has one. Erasing (`None`) takes no room.
    allowed: dict[str | None, None] = {None: None}  # an ordered set
    while uncovered := [names for names in shuffled if allowed.keys().isdisjoint(names)]:
        shared = Counter(chain.from_iterable(uncovered))
        allowed[max(shared, key=shared.get)] = None
    if len(allowed) - 1 > max_distinct:
        raise PrototypeError(
            f"No exact edit exists: {len(shuffled)} concepts need at least one target each, and there is "
            f"room for {max_distinct} different targets. Forget fewer concepts, let them share targets, or "
            "erase without remapping (remap_to=None)."
        )

    # 2. Fill the remaining room in turns: every concept's first option, then every concept's second, ...
    for turn in zip_longest(*shuffled):
        for name in turn:
            if name not in allowed and len(allowed) <= max_distinct:
                allowed[name] = None
    shuffled = [[name for name in names if name in allowed] for names in shuffled]

    # 3. Expert e takes each concept's e-th allowed option, starting again after the last.
    if num_experts is None:
        num_experts = math.lcm(*map(len, shuffled))
    return [[names[expert % len(names)] for names in shuffled] for expert in range(num_experts)]
