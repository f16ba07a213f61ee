"""
From a request to its solution: prototypes, every expert's targets, and the remap of each space of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from ..core.errors import PrototypeError
from ..core.experts import draw_experts
from ..core.options import SOLVERS
from ..core.prototypes import Prototypes
from ..core.remap import Remap
from ..core.request import ConceptRequest
from .encoder import column, fit_prototypes, kinds_of
from .prompts import TEMPLATES, everyday_prompts, names_in
from .sites import Denoiser, find_denoiser, text_of


@dataclass(frozen=True)
class Problem:
    """
    What one space's remap is solved from.

    Args:
        prototypes (`Prototypes`):
            Everything that was fitted.
        forget (`list[str]`):
            Names of the prototypes to forget.
        targets (`list[list[str | None]]`):
            For each expert, what each of them is sent to; `None` erases.
        retained (`dict[str, list[str]]`):
            The prototypes of each retained name that is no target.
    """

    prototypes: Prototypes
    forget: list[str]
    targets: list[list[str | None]]
    retained: dict[str, list[str]]

    def fit(self, solver: str, shrinkage: float = 1e-4) -> Remap:
        """
        Solve exactly. Raises `PrototypeError` if there is no exact edit.

        `pinv` keeps retained names exact, in P. `covariance` spares them through Σ, to which their prompts
        were added: forcing many close prototypes to be exact makes D_F large, and then everything else moves
        more (measured).
        """
        prototypes = self.prototypes
        if solver == "covariance":
            spared = [name for names in self.retained.values() for name in names]
            prototypes = prototypes.without(spared)
        return Remap.fit(prototypes, self.forget, self.targets, solver=solver, shrinkage=shrinkage)


@dataclass(frozen=True)
class Solution:
    """
    The remap of each space and the facts behind them.

    Args:
        remaps (`dict[str, Remap]`):
            By space.
        solver_reason (`str`):
            Why the solvers were taken, in words and numbers.
        retained_moved (`dict[str, float]`):
            How far each retained name moves at most, as a share of its length.
    """

    remaps: dict[str, Remap]
    solver_reason: str
    retained_moved: dict[str, float]


def check_names(request: ConceptRequest) -> None:
    """Raises `PrototypeError` when a name is blank, given twice, or both forgotten and kept."""
    surfaces = request.surfaces
    kept = {name: "remap_to" for name in request.targets}
    kept |= {name: "retain" for name in request.retain if name not in kept}
    if blank := [name for name in (*surfaces, *kept) if not name.strip()]:
        raise PrototypeError(
            f"{blank[0]!r} is not a name. The empty prompt is always retained; leave it out."
        )
    folded = [surface.casefold() for surface in surfaces]
    if twice := [surface for surface in surfaces if folded.count(surface.casefold()) > 1]:
        raise PrototypeError(f"{twice[0]!r} is given twice among concepts and aliases. Name it once.")
    for name, argument in kept.items():
        for surface in surfaces:
            _check_apart(name, argument, surface)


def _check_apart(name: str, argument: str, surface: str) -> None:
    if name.casefold() == surface.casefold():
        raise PrototypeError(f"{name!r} is both erased and in `{argument}`. Remove it from one of the lists.")
    if names_in(name, surface):
        raise PrototypeError(
            f"{name!r} in `{argument}` contains {surface!r}, which is erased: keeping one keeps the other. "
            f"If it is the same concept, make it an alias, concepts={{{surface!r}: [{name!r}]}}, and take it "
            f"out of `{argument}`."
        )


def prepare(
    pipe: DiffusionPipeline,
    request: ConceptRequest,
    sigma_prompts: Sequence[str],
    denoiser: Denoiser | None = None,
) -> dict[str, Problem]:
    """
    Fit the prototypes and draw every expert's targets. Changes nothing. `denoiser` is for a pipeline that was
    loaded without it.

    The same request draws the same targets, for all spaces, and finds the same prototypes from the same text
    encoders: `verify` relies on it.
    """
    check_names(request)
    names = [*request.surfaces, *request.targets, *request.retain]
    templates = request.templates or TEMPLATES
    denoiser = denoiser or find_denoiser(pipe)
    prototypes = fit_prototypes(
        pipe, names, request.tokens, sigma_prompts=sigma_prompts, templates=templates, denoiser=denoiser
    )
    kinds = kinds_of(text_of(pipe, denoiser), request.tokens, pooled=request.pooled)
    # Distinct targets that leave D_F small: half of the dimensions, less the forgotten ones (the smallest
    # space decides).
    room = min(len(prototypes[space].matrix) // (2 * len(kinds[space])) for space in kinds)
    experts = draw_experts(
        [names or (None,) for names in request.remap_to.values()],
        request.num_experts,
        max_distinct=max(1, room - len(request.surfaces)),
        seed=request.seed,
    )
    # Every alias goes where its concept goes.
    sizes = [1 + len(aliases) for aliases in request.concepts.values()]
    spread = [_repeated(targets, sizes) for targets in experts]
    retained = [name for name in request.retain if name not in request.targets]
    problems = {}
    for space, kinds_here in kinds.items():
        problems[space] = Problem(
            prototypes=prototypes[space],
            forget=_columns(request.surfaces, kinds_here),
            targets=[_columns(targets, kinds_here) for targets in spread],
            retained={name: _columns([name], kinds_here) for name in retained},
        )
    return problems


def _repeated(names: Sequence[str | None], sizes: Sequence[int]) -> list[str | None]:
    repeated = []
    for name, size in zip(names, sizes, strict=True):
        repeated += [name] * size
    return repeated


def _columns(names: Sequence[str | None], kinds: Sequence[str]) -> list[str | None]:
    """The prototypes of names, every kind of each; `None` stays `None`."""
    columns = []
    for name in names:
        columns += [name and column(name, kind) for kind in kinds]
    return columns


def ordinary_prompts(pipe: DiffusionPipeline, request: ConceptRequest) -> list[str]:
    """The prompts behind Σ: everyday ones that hold no forgotten name, and those of retained names."""
    everyday = request.everyday or everyday_prompts(pipe.tokenizer)
    prompts = [
        prompt for prompt in everyday if not any(names_in(prompt, surface) for surface in request.surfaces)
    ]
    for name in request.retain:
        prompts += [template.format(name) for template in request.templates or TEMPLATES]
    return prompts


def solve(pipe: DiffusionPipeline, request: ConceptRequest) -> Solution:
    """
    Solve a request; changes nothing.

    `auto` solves both ways, which is cheap next to encoding, and takes the one that moves ordinary prompts
    less.

    Raises:
        `PrototypeError`: a name is wrong, or no exact edit exists.
    """
    solvers = SOLVERS if request.solver == "auto" else (request.solver,)
    remaps, reasons, moved = {}, {}, {}
    check_names(request)
    for space, problem in prepare(pipe, request, ordinary_prompts(pipe, request)).items():
        remaps[space], reasons[space] = _solve_space(problem, solvers, request.shrinkage)
        for name, columns in problem.retained.items():
            features = torch.stack([problem.prototypes[name] for name in columns])
            moved[name] = max(moved.get(name, 0.0), remaps[space].moved(features))
    reason = reasons["tokens"]
    if "pooled" in remaps:
        reason += f"; pooled: {remaps['pooled'].solver}, {reasons['pooled']}"
    return Solution(remaps, reason, moved)


def _solve_space(problem: Problem, solvers: Sequence[str], shrinkage: float) -> tuple[Remap, str]:
    """
    The remap of one space, and why its solver was taken. Raises `PrototypeError` if no solver has an exact
    edit.
    """
    solved: dict[str, Remap] = {}
    costs = []
    for solver in solvers:
        try:
            solved[solver] = problem.fit(solver, shrinkage)
        except PrototypeError:  # pinv has more prototypes to keep: too many, or dependent ones
            if solver == solvers[-1] and not solved:
                raise
            costs.append(f"{solver} has no exact edit")
    moved = {solver: remap.verify()["ordinary_moved"] for solver, remap in solved.items()}
    remap = solved[min(moved, key=moved.get)]
    costs += [f"{solver} {100 * value:.2f} %" for solver, value in moved.items()]
    chosen = "as asked for, moves ordinary prompts by"
    if len(solvers) > 1:
        chosen = "of the exact edits, the one that moves ordinary prompts least"
    d, k = remap.prototypes.matrix.shape
    return remap, f"{chosen} ({', '.join(costs)}); {k} independent prototypes in {d} dimensions"
