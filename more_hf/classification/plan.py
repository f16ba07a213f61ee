"""What is asked for: one JSON-able form of `erase_classes`'s arguments, its checks, and its solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch

from ..core.errors import PrototypeError
from ..core.experts import draw_experts
from ..core.prototypes import Prototypes
from ..core.remap import SOLVERS, Remap
from ..core.routers import ROUTERS
from .labels import find_class


REMAIN = "remain"
ILL_CONDITIONED = 1e4  # beyond this condition number of P, D_F amplifies a feature's rounding and noise too much to be of use


def make_request(
    names: Sequence[str], forget, remap_to, num_experts, router, solver, seed, head: list[str], at: str | None
) -> dict[str, Any]:
    """The arguments in one JSON-able form, classes by name. Raises `PrototypeError`."""
    for value, name, known in ((solver, "solver", ("auto", *SOLVERS)), (router, "router", (None, *ROUTERS))):
        if value not in known:
            raise PrototypeError(f"Unknown {name} {value!r}. Choose one of {', '.join(map(repr, known))}.")
    if num_experts is not None and num_experts < 1:
        raise PrototypeError(f"`num_experts` must be at least 1, got {num_experts}.")
    forgotten = [find_class(names, wanted) for wanted in _listed(forget)]
    if not forgotten:
        raise PrototypeError("`forget` is empty. Name at least one class to forget.")
    if twice := [name for name in forgotten if forgotten.count(name) > 1]:
        raise PrototypeError(f"{twice[0]!r} is in `forget` twice. Name it once.")
    targets = None if remap_to is None else REMAIN if _is_remain(remap_to) else [find_class(names, wanted) for wanted in _listed(remap_to)]
    if targets == []:
        raise PrototypeError('`remap_to` is empty. Name classes, or pass "remain" for all others, or `None` to erase without remapping.')
    return {
        "concepts": {name: [] for name in forgotten},
        "remap_to": {name: targets for name in forgotten},
        "solver": solver,
        "num_experts": num_experts,
        "router": router,
        "seed": seed,
        "head": head,
        "at": at,
    }


def _listed(value: str | int | Sequence[str | int]) -> list[str | int]:
    return [value] if isinstance(value, str | Integral) else list(value)


def _is_remain(value: Any) -> bool:
    return isinstance(value, str) and value == REMAIN


def check_request(names: Sequence[str], request: Mapping[str, Any]) -> None:
    """Raises `PrototypeError` when nothing would remain, or a class is both forgotten and a target."""
    forget = set(request["concepts"])
    if len(forget) == len(names):
        raise PrototypeError(f"`forget` has all {len(names)} classes of the model, so that nothing remains. Leave at least one out.")
    for targets in request["remap_to"].values():
        if both := [name for name in targets or () if targets != REMAIN and name in forget]:
            raise PrototypeError(f"{both[0]!r} is both in `forget` and in `remap_to`. Remove it from one of them.")


def solve(prototypes: Prototypes, widths: Sequence[int], request: Mapping[str, Any]) -> tuple[list[Remap], dict[str, Any]]:
    """The remap of each head, all with the same targets, and the facts behind them. `widths`: how many of the features each reads.

    `pinv` keeps every class exact, in P. `covariance` has the forgotten classes and their targets in P and spares the others through Σ.
    """
    forget = list(request["concepts"])
    for name in [*forget, *(name for targets in request["remap_to"].values() if targets != REMAIN for name in targets or ())]:
        prototypes.index(name)  # raises for a class without one
    remain = [name for name in prototypes.names if name not in forget]
    options = [remain if targets == REMAIN else targets or [None] for targets in request["remap_to"].values()]
    heads = _split(prototypes, widths)
    solver, reason = _choose_solver(heads, request["solver"])
    single = request["num_experts"] is None and request["router"] is None and REMAIN in request["remap_to"].values()
    experts = draw_experts(
        options,
        1 if single else request["num_experts"],
        max_distinct=len(remain) if solver == "pinv" else max(1, min(widths) // 2 - len(forget)),
        seed=request["seed"],
    )
    used = {name for expert in experts for name in expert}
    spared = [] if solver == "pinv" else [name for name in remain if name not in used]
    remaps = [Remap.fit(head.without(spared), forget, experts, solver=solver) for head in heads]
    moved = {name: max(_moved(remap, head[name], request["router"]) for remap, head in zip(remaps, heads, strict=True)) for name in spared}
    return remaps, {
        "solver": solver,
        "solver_reason": reason,
        "sent_to": {name: [t for t in dict.fromkeys(e[i] for e in experts) if t is not None] for i, name in enumerate(forget)},
        "rank": len(forget),
        "num_experts": len(experts),
        "condition_number": max(remap.condition_number for remap in remaps),
        "remain_moved": dict(sorted(moved.items(), key=lambda item: -item[1])),
    }


def _split(prototypes: Prototypes, widths: Sequence[int]) -> list[Prototypes]:
    """Each head's rows of the features."""
    parts, start = [], 0
    for width in widths:
        rows = slice(start, start + width)
        moment = None if prototypes.second_moment is None else prototypes.second_moment[rows, rows]
        parts.append(replace(prototypes, matrix=prototypes.matrix[rows], second_moment=moment))
        start += width
    return parts


def _choose_solver(heads: Sequence[Prototypes], asked: str) -> tuple[str, str]:
    d, k = heads[0].matrix.shape
    condition = max(float(torch.linalg.cond(head.matrix / head.matrix.norm(dim=0))) for head in heads)
    facts = f"{k} prototypes in {d} dimensions, condition number {condition:.3g}"
    if asked != "auto":
        return asked, f"as asked for; {facts}"
    if k > d:
        return "covariance", f"more classes than features, so that not all can stay exactly; {facts}"
    if condition > ILL_CONDITIONED:
        return "covariance", f"prototypes nearly dependent (condition number above {ILL_CONDITIONED:.0e}); {facts}"
    return "pinv", f"every other class stays exactly; {facts}"


def _moved(remap: Remap, prototype: torch.Tensor, router: str | None) -> float:
    """How far an expert moves a remain prototype at most, relative to its length."""
    experts = (None,) if router is None else range(remap.num_experts)
    return max(float((remap.apply(prototype, expert) - prototype).norm() / prototype.norm()) for expert in experts)
