"""What is asked for: one JSON-able form of `erase_concept`'s arguments, its checks, and its solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..core.errors import PrototypeError
from ..core.experts import draw_experts
from ..core.remap import SOLVERS, Remap
from ..core.routers import ROUTERS
from .encoder import TOKENS, column, fit_prototypes, kinds_of
from .prompts import TEMPLATES, everyday_prompts, names_in
from .text import text_of


def make_request(concepts, remap_to, retain, num_experts, router, solver, tokens, seed, pooled=True) -> dict[str, Any]:
    """The arguments in one JSON-able form. Raises `PrototypeError` before anything is looked at."""
    for value, name, known in (
        (tokens, "tokens", TOKENS),
        (solver, "solver", ("auto", *SOLVERS)),
        (router, "router", (None, *ROUTERS)),
    ):
        if value not in known:
            raise PrototypeError(f"Unknown {name} {value!r}. Choose one of {', '.join(map(repr, known))}.")
    if num_experts is not None and num_experts < 1:
        raise PrototypeError(f"`num_experts` must be at least 1, got {num_experts}.")
    if not isinstance(concepts, Mapping):
        concepts = {name: () for name in _names(concepts)}
    concepts = {name: _names(also) for name, also in concepts.items()}
    if not concepts:
        raise PrototypeError("`concepts` is empty. Name at least one concept to erase.")
    targets = _names(remap_to)
    if remap_to is not None and not targets:
        raise PrototypeError(
            f"`remap_to` is empty. Remapping needs at least one concept to send {next(iter(concepts))!r} to; "
            "pass `remap_to=None` to project it out without remapping."
        )
    return {
        "concepts": concepts,
        "remap_to": {name: targets for name in concepts},
        "retain": _names(retain),
        "tokens": tokens,
        "solver": solver,
        "num_experts": num_experts,
        "router": router,
        "seed": seed,
        "pooled": pooled,
    }


def _names(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def surfaces_of(request: Mapping[str, Any]) -> list[str]:
    """Every forgotten surface form. Raises `PrototypeError` when a name is both forgotten and kept, or given twice."""
    surfaces = [surface for name, also in request["concepts"].items() for surface in (name, *also)]
    kept = {name: "remap_to" for names in request["remap_to"].values() for name in names}
    kept.update({name: "retain" for name in request["retain"] if name not in kept})
    if blank := [name for name in (*surfaces, *kept) if not name.strip()]:
        raise PrototypeError(f"{blank[0]!r} is not a name. The empty prompt is always retained; leave it out.")
    folded = [surface.casefold() for surface in surfaces]
    if twice := [surface for surface in surfaces if folded.count(surface.casefold()) > 1]:
        raise PrototypeError(f"{twice[0]!r} is given twice among concepts and aliases. Name it once.")
    for name, argument in kept.items():
        for surface in surfaces:
            if name.casefold() == surface.casefold():
                raise PrototypeError(f"{name!r} is both erased and in `{argument}`. Remove it from one of the lists.")
            if names_in(name, surface):
                raise PrototypeError(
                    f"{name!r} in `{argument}` contains {surface!r}, which is erased: keeping one keeps the other. If it is the same "
                    f"concept, make it an alias, concepts={{{surface!r}: [{name!r}]}}, and take it out of `{argument}`."
                )
    return surfaces


def prepare(pipe: DiffusionPipeline, request: Mapping[str, Any], sigma_prompts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Space -> the arguments of `Remap.fit` but for the solver: prototypes from the text encoders, and every expert's targets.

    A request always draws the same targets, for all spaces, and finds the same prototypes from the same text encoders: `verify` relies
    on it.
    """
    surfaces = surfaces_of(request)
    targets = [name for names in request["remap_to"].values() for name in names]
    prototypes = fit_prototypes(pipe, [*surfaces, *targets, *request["retain"]], request["tokens"], sigma_prompts=sigma_prompts)
    kinds = _kinds(pipe, request)
    drawn = draw_experts(
        [names or [None] for names in request["remap_to"].values()],
        request["num_experts"],
        max_distinct=max(1, min(len(prototypes[space].matrix) // (2 * len(kinds[space])) for space in kinds) - len(surfaces)),
        seed=request["seed"],
    )
    sizes = [1 + len(aliases) for aliases in request["concepts"].values()]  # every alias goes where its concept goes
    sent = [[name for name, size in zip(expert, sizes, strict=True) for _ in range(size)] for expert in drawn]
    return {
        space: {
            "prototypes": prototypes[space],
            "forget": [column(surface, kind) for surface in surfaces for kind in kinds[space]],
            "targets": [[name and column(name, kind) for name in expert for kind in kinds[space]] for expert in sent],
        }
        for space in kinds
    }


def _kinds(pipe: DiffusionPipeline, request: Mapping[str, Any]) -> dict[str, list[str]]:
    """The kinds of prototype of every space that is edited."""
    kinds = kinds_of(text_of(pipe), request["tokens"])
    return {space: names for space, names in kinds.items() if space == "tokens" or request["pooled"]}


def solve(pipe: DiffusionPipeline, request: Mapping[str, Any]) -> tuple[dict[str, Remap], dict[str, Any]]:
    """Space -> the remap, and the facts behind it: why its solver was taken, and how far retained names move. Changes nothing.

    `pinv` keeps retained names exact, in P. `covariance` spares them through Σ, to which their prompts are added: forcing many close
    prototypes to be exact makes D_F large, and then everything else moves more (measured). `auto` solves both ways, which is cheap
    beside encoding, and takes the one that moves ordinary prompts less.
    """
    surfaces = surfaces_of(request)
    ordinary = [prompt for prompt in everyday_prompts(pipe.tokenizer) if not any(names_in(prompt, surface) for surface in surfaces)]
    ordinary += [template.format(name) for name in request["retain"] for template in TEMPLATES]
    sent_to = {name for names in request["remap_to"].values() for name in names}
    names = [name for name in request["retain"] if name not in sent_to]
    solvers = SOLVERS if request["solver"] == "auto" else (request["solver"],)
    remaps, reasons, moved = {}, {}, dict.fromkeys(names, 0.0)
    for space, problem in prepare(pipe, request, ordinary).items():
        retained = {name: [column(name, kind) for kind in _kinds(pipe, request)[space]] for name in names}
        remaps[space], reasons[space] = _solve_space(problem, retained, solvers)
        for name, columns in retained.items():
            features = torch.stack([problem["prototypes"][c] for c in columns])
            moved[name] = max(moved[name], remaps[space].moved(features))
    pooled = f"; pooled: {remaps['pooled'].solver}, {reasons['pooled']}" if "pooled" in remaps else ""
    return remaps, {
        "solver": remaps["tokens"].solver,
        "solver_reason": reasons["tokens"] + pooled,
        "retained_moved": moved,
    }


def _solve_space(problem: Mapping[str, Any], retained: Mapping[str, list[str]], solvers: Sequence[str]) -> tuple[Remap, str]:
    """The remap of one space, and why its solver was taken. Raises `PrototypeError` if no solver has an exact edit."""
    everything = problem["prototypes"]
    exact = {"pinv": everything, "covariance": everything.without({c for columns in retained.values() for c in columns})}
    solved, costs = {}, []
    for solver in solvers:
        try:
            solved[solver] = Remap.fit(**{**problem, "prototypes": exact[solver]}, solver=solver)
        except PrototypeError as error:  # pinv has more prototypes to keep: too many, or dependent ones
            costs.append(f"{solver} has no exact edit")
            impossible = error
    if not solved:
        raise impossible
    cost = {solver: remap.verify()["ordinary_moved"] for solver, remap in solved.items()}
    remap = solved[min(cost, key=cost.get)]
    d, k = remap.prototypes.matrix.shape
    costs += [f"{solver} {100 * value:.2f} %" for solver, value in cost.items()]
    asked = (
        "of the exact edits, the one that moves ordinary prompts least" if len(solvers) > 1 else "as asked for, moves ordinary prompts by"
    )
    return remap, f"{asked} ({', '.join(costs)}); {k} independent prototypes in {d} dimensions"
