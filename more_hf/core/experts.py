"""Which target each forgotten concept has in each expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import torch

from .errors import PrototypeError


def draw_experts(
    options: Sequence[Sequence[str | None]], num_experts: int | None, *, max_distinct: int, seed: int = 0
) -> list[list[str | None]]:
    """Draw the target of each forgotten concept in each expert, without replacement until all its options are used, then again.

    Args:
        options (`Sequence[Sequence[str | None]]`): for each concept the names it may be sent to; `[None]` erases it.
        num_experts (`int`, *optional*): if `None`, the fewest that use every option of every concept equally often, so that the
            mean expert sends a concept to the plain mean of its options.
        max_distinct (`int`): how many different targets there may be in all. Experts share targets beyond that.
        seed (`int`, defaults to 0): of the draw.

    Returns `num_experts` lists with one target per concept. Raises `PrototypeError` if there is not even room for one each.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = [[list(names)[i] for i in torch.randperm(len(names), generator=generator)] for names in options]
    allowed: list[str | None] = [None]
    while uncovered := [names for names in shuffled if not set(names) & set(allowed)]:  # one for each concept, shared where it can be
        pool = [name for names in uncovered for name in names]
        allowed.append(max(pool, key=pool.count))
    if len(allowed) - 1 > max_distinct:
        raise PrototypeError(
            f"No exact edit exists: {len(shuffled)} concepts need at least one target each, and there is room for {max_distinct} "
            "different targets. Forget fewer concepts, let them share targets, or erase without remapping (remap_to=None)."
        )
    for round_robin in zip_longest(*shuffled):  # then more, so that every concept gets its share of the room
        for name in round_robin:
            if name not in allowed and len(allowed) <= max_distinct:
                allowed.append(name)
    shuffled = [[name for name in names if name in allowed] for names in shuffled]
    num_experts = math.lcm(*map(len, shuffled)) if num_experts is None else num_experts
    return [[names[expert % len(names)] for names in shuffled] for expert in range(num_experts)]
