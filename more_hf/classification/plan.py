"""From a request to its solution: the targets of every expert, and the remap of each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import PrototypeError
from ..core.prototypes import Prototypes
from ..core.remap import Remap, draw_experts
from ..core.request import REMAIN, ClassRequest, is_remain
from .names import find_classes


# Beyond this condition number of P, D_F amplifies a feature's rounding and noise too much.
ILL_CONDITIONED = 1e4


@dataclass(frozen=True)
class Solution:
    """The remap of each head and the facts behind them."""

    remaps: list[Remap]  # one per head, all with the same targets
    solver_reason: str  # why the solver was taken, in words and numbers
    sent_to: dict[str, list[str]]  # the targets that were drawn for each forgotten class
    # how far the prototypes moved that were not kept exactly, as a share of their length; farthest first
    remain_moved: dict[str, float]


def make_request(
    names: Sequence[str], forget: Any, remap_to: Any, *, head: Sequence[str], at: str | None, **options: Any
) -> ClassRequest:
    """
    The request from the arguments of `erase_classes`, classes by name. `names` are the model's classes.

    Raises:
        `PrototypeError`: a class is unknown or named twice, or an option is wrong.
    """
    forgotten = find_classes(names, "forget", forget)
    if twice := [name for name in forgotten if forgotten.count(name) > 1]:
        raise PrototypeError(f"{twice[0]!r} is in `forget` twice. Name it once.")
    targets: tuple[str, ...] | str = REMAIN
    if not is_remain(remap_to):
        targets = tuple(find_classes(names, "remap_to", remap_to))
    if remap_to is not None and not targets:
        raise PrototypeError(
            '`remap_to` is empty. Name classes, or pass "remain" for all others, or `None` to erase without '
            "remapping."
        )
    return ClassRequest(
        concepts=dict.fromkeys(forgotten, ()),
        remap_to=dict.fromkeys(forgotten, targets),
        head=tuple(head),
        at=at,
        **options,
    )


def check_request(names: Sequence[str], request: ClassRequest) -> None:
    """Raises `PrototypeError` when nothing would remain, or a class is both forgotten and a target."""
    if len(request.concepts) == len(names):
        raise PrototypeError(
            f"`forget` has all {len(names)} classes of the model, so that nothing remains. Leave at least "
            "one out."
        )
    if both := [name for name in request.targets if name in request.concepts]:
        raise PrototypeError(
            f"{both[0]!r} is both in `forget` and in `remap_to`. Remove it from one of them."
        )


def solve(prototypes: Prototypes, widths: Sequence[int], request: ClassRequest) -> Solution:
    """
    Solve a request. `widths` says how many of the features each head reads.

    `pinv` keeps every class exact, in P. `covariance` has the forgotten classes and their targets in P and
    spares the others through Σ.

    Raises:
        `PrototypeError`: a class has no prototype, or no exact edit exists.
    """
    forget = list(request.concepts)
    for name in [*forget, *request.targets]:
        prototypes.index(name)  # raises for a class without one
    remain = [name for name in prototypes.names if name not in forget]
    heads = _split(prototypes, widths)
    solver, reason = _choose_solver(heads, request.solver)

    # 1. Every expert's targets; by default as many experts as use each target equally often.
    options = [remain if is_remain(targets) else targets or (None,) for targets in request.remap_to.values()]
    room = len(remain) if solver == "pinv" else min(widths) // 2 - len(forget)
    experts = draw_experts(options, request.num_experts, max_distinct=room, seed=request.seed)

    # 2. One remap per head. What is not a target need not stay exact under `covariance`.
    used = {name for expert in experts for name in expert}
    spared = [] if solver == "pinv" else [name for name in remain if name not in used]
    remaps = [Remap.fit(head.without(spared), forget, experts, solver=solver) for head in heads]

    # 3. What was measured.
    moved = {}
    if spared:
        shares = [
            _movement(remap, head, spared, request.router) for remap, head in zip(remaps, heads, strict=True)
        ]
        moved = dict(zip(spared, torch.stack(shares).amax(0).tolist(), strict=True))
    sent_to = {}
    for i, name in enumerate(forget):
        drawn = dict.fromkeys(expert[i] for expert in experts)
        sent_to[name] = [target for target in drawn if target is not None]
    farthest_first = dict(sorted(moved.items(), key=lambda item: -item[1]))
    return Solution(remaps, reason, sent_to, farthest_first)


def _split(prototypes: Prototypes, widths: Sequence[int]) -> list[Prototypes]:
    """Each head's rows of the features."""
    parts, start = [], 0
    for width in widths:
        rows = slice(start, start + width)
        moment = None if prototypes.second_moment is None else prototypes.second_moment[rows, rows]
        parts.append(replace(prototypes, matrix=prototypes.matrix[rows], second_moment=moment))
        start += width
    return parts


def _choose_solver(heads: Sequence[Prototypes], solver: str) -> tuple[str, str]:
    """The solver, and why."""
    d, k = heads[0].matrix.shape
    condition = max(float(torch.linalg.cond(head.unit)) for head in heads)
    facts = f"{k} prototypes in {d} dimensions, condition number {condition:.3g}"
    if solver != "auto":
        return solver, f"as asked for; {facts}"
    if k > d:
        return "covariance", f"more classes than features, so that not all can stay exactly; {facts}"
    if condition > ILL_CONDITIONED:
        return (
            "covariance",
            f"prototypes nearly dependent (condition number above {ILL_CONDITIONED:.0e}); {facts}",
        )
    return "pinv", f"every other class stays exactly; {facts}"


def _movement(remap: Remap, head: Prototypes, names: Sequence[str], router: str | None) -> Tensor:
    """How far an expert moves each of the prototypes at most, `(n,)`, as a share of its length."""
    z = torch.stack([head[name] for name in names], dim=1)  # (d, n)
    read, farthest = remap.D_F @ z, torch.zeros(len(names), dtype=z.dtype)
    for expert in (None,) if router is None else range(remap.num_experts):
        farthest = torch.maximum(farthest, (remap.shift(expert) @ read).norm(dim=0))
    return farthest / z.norm(dim=0)
