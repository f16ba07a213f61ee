"""From a request to its solution: prototypes, every expert's targets, and the remap of each feature space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..core.errors import PrototypeError
from ..core.facts import kind_of
from ..core.prototypes import Prototypes
from ..core.remap import Remap, draw_experts
from ..core.request import EXACT_SOLVERS, ConceptRequest
from .activations import Activations, target_of
from .encoder import Encoder, column, fit_prototypes, kinds_of
from .ordinary import with_ordinary_moment


# An exact edit may move ordinary prompts by at most this share; beyond it, `auto` tries fewer prototypes,
# then the soft solver.
MAX_COST = 0.12
# Beyond this share, what names were sent to is recognized less often in their pictures
# (`benchmarks/artists/many/order`): `auto` takes fewer prototypes for a soft edit, too, and `erase` warns.
MOST_MOVED = 0.2


@dataclass(frozen=True)
class Problem:
    """The input from which one space's remap is solved."""

    prototypes: Prototypes
    # token choice -> the kinds of prototype that a name has; the requested choice, then smaller ones
    kinds: dict[str, list[str]]
    request: ConceptRequest
    experts: list[list[str | None]]  # for each expert, the target of each concept; `None` erases

    def fit(self, solver: str, tokens: str) -> Remap:
        """
        Solve with the prototypes of these token positions. Raises `PrototypeError` if there is no exact edit.

        `pinv` keeps retained names exact, as columns of P. The other solvers spare them through Σ, which
        includes their prompts: forcing many close prototypes to be exact makes D_F large, and then everything
        else moves more (measured).
        """
        # Retained names are columns of P for `pinv` alone.
        exact = self.names if solver == "pinv" else [name for name in self.names if name not in self.retained]
        named = {name for all_tokens in self.kinds for name in self.columns(self.names, all_tokens)}
        remap = Remap.fit(
            self.prototypes.without(named.difference(self.columns(exact, tokens))),
            self.columns(self.request.surfaces, tokens),
            [self.columns(names, tokens) for names in self.targets],
            solver=solver,
            shrinkage=self.request.shrinkage,
            softness=self.request.softness,
        )
        return replace(remap, strength=self.request.strength)

    def columns(self, names: Sequence[str | None], tokens: str) -> list[str | None]:
        """The prototypes of names, one of each kind that these tokens give; `None` stays `None`."""
        columns = []
        for name in names:
            columns += [name and column(name, kind) for kind in self.kinds[tokens]]
        return columns

    @property
    def targets(self) -> list[list[str | None]]:
        """For each expert, the target of each forgotten name or alias, which goes where its concept does."""
        expanded = []
        for targets in self.experts:
            own: list[str | None] = []
            for target, name in zip(targets, self.request.concepts, strict=True):
                if name in self.request.named:
                    own += [target] * (1 + len(self.request.named[name]))
            expanded.append(own)
        return expanded

    @property
    def retained(self) -> list[str]:
        """Retained names that are not targets."""
        return [name for name in self.request.retain if name not in self.request.targets]

    @property
    def names(self) -> list[str]:
        """Every name that has prototypes and a role in this draw of targets."""
        names = [*self.request.surfaces, *self.retained]
        for targets in self.experts:
            names += [name for name in targets if name is not None]
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Solution:
    """The remap of each space and the facts behind them."""

    remaps: dict[str, Remap]
    tokens: str  # the token positions that made prototypes
    solver_reason: str  # why these solvers were chosen, in words and numbers
    retained_moved: dict[str, float]  # how far each retained name moves at most, as a share of its length
    sent_to: dict[str, list[str | None]]  # each concept's target in every expert

    @property
    def ordinary_moved(self) -> float:
        """How far ordinary prompts move, as a share of their length, in the space where they move most."""
        return max((remap.ordinary_moved for remap in self.remaps.values()), default=0.0)

    def inside(self, request: ConceptRequest) -> dict[str, list[str | None]]:
        """The targets of each concept that is also erased inside the denoiser."""
        return {name: self.sent_to[name] for name in request.inside}

    def with_activations(self, activations: Activations, request: ConceptRequest) -> Solution:
        """
        This solution with a remap of each activation space as well. Its experts are all the same, since there
        the edit is in the weights alone.
        """
        remaps = {}
        for space, pairs in activations.prototypes.items():
            forget = [name for name in pairs.names if target_of(name) in pairs.names]
            targets = [[target_of(name) for name in forget]] * len(next(iter(self.sent_to.values())))
            own = activations.own[space]
            remap = Remap.regress(pairs, forget, targets, own, softness=request.softness)
            remaps[space] = replace(remap, strength=request.strength)
        return replace(self, remaps={**self.remaps, **remaps})


def prepare(
    encoder: Encoder,
    request: ConceptRequest,
    prototypes: Mapping[str, Prototypes] | None = None,
    *,
    metric: bool = True,
) -> dict[str, Problem]:
    """
    Draw every expert's targets, and fit the prototypes, with Σ if a `metric` is needed, unless those of
    exactly the request's names are given. No problem is left where nothing that is forgotten has a name: the
    layers that read text stay as they are. Changes nothing.

    The same request draws the same targets for all spaces, and the same text encoders give the same
    prototypes; `verify` relies on both.
    """
    if not request.named:
        return {}
    prototypes = prototypes or fit_request(encoder, request, metric=metric)
    # 1. The kinds of prototype of the requested token positions.
    choices = {}
    for tokens in token_choices(request):
        choices[tokens] = kinds_of(encoder.text, tokens, pooled=request.pooled)
    # the widest choice, which limits how many targets there can be
    kinds = choices[request.tokens]

    # 2. Draw the experts. D_F stays small with as many distinct targets as fill half of the smallest space's
    # dimensions, together with the forgotten names.
    room = min(len(prototypes[space].matrix) // (2 * len(kinds[space])) for space in kinds)
    experts = draw_experts(
        [names or (None,) for names in request.remap_to.values()],
        request.num_experts,
        max_distinct=room - len(request.surfaces),
        seed=request.seed,
    )

    problems = {}
    for space in kinds:
        problems[space] = Problem(
            prototypes=prototypes[space],
            kinds={tokens: kinds_by_space[space] for tokens, kinds_by_space in choices.items()},
            request=request,
            experts=experts,
        )
    return problems


def fit_request(encoder: Encoder, request: ConceptRequest, *, metric: bool = True) -> dict[str, Prototypes]:
    """The prototypes of every name in a request, by the requested token positions, with Σ if asked for."""
    names = [*request.surfaces, *request.targets, *request.retain]
    # The prompts of retained names count towards Σ; `verify` of an exact edit needs none.
    retained_prompts = encoder.prompts_of(request.retain) if metric else {}
    prototypes = fit_prototypes(encoder, names, request.tokens, sigma_prompts=retained_prompts)
    return with_ordinary_moment(prototypes, encoder, request) if metric else prototypes


def token_choices(request: ConceptRequest) -> tuple[str, ...]:
    """The token positions that may make prototypes: the requested ones, then fewer if they cost too much."""
    if request.solver == "auto" and request.tokens == "positions":
        return "positions", "last+end"
    return (request.tokens,)


def solve(
    encoder: Encoder, request: ConceptRequest, prototypes: Mapping[str, Prototypes] | None = None
) -> Solution:
    """
    Solve a request; changes nothing. `prototypes` are those of its names, if they are there already.

    `auto` decides by features alone, and alike at every strength. A single concept is erased exactly. For
    several, it takes the first of these edits that at strength 1 moves ordinary prompts by at most
    `MAX_COST`: exact with all token positions; exact with the last token and the end token; or else softly:
    with all positions if that moves them by at most `MOST_MOVED` or less than the two do, else with those.
    "Exact" is `pinv` or `covariance`, whichever moves ordinary prompts less. A router needs an exact edit
    (G3), so it takes the second whatever it costs.

    Raises:
        `PrototypeError`: a name is wrong, or no exact edit exists where one is needed.
    """
    problems = prepare(encoder, request, prototypes)
    if not problems:
        experts = draw_experts(
            [names or (None,) for names in request.remap_to.values()],
            request.num_experts,
            max_distinct=len(request.targets),
            seed=request.seed,
        )
        return Solution(
            {}, request.tokens, "no layer that reads the prompt is edited", {}, _sent_to(request, experts)
        )
    if request.solver != "auto":
        return _solution(problems, (request.solver,), request.tokens, "as asked for")

    # `auto`: exact edits first, from most to fewest prototypes, since fewer prototypes move less.
    choices = token_choices(request)
    alone = len(request.named) == 1
    why = "exact" if request.strength == 1 else "exact at strength 1"
    rejected: list[str] = []  # the exact edits that were passed over
    for tokens in choices:
        last_resort = tokens == choices[-1] and (alone or request.router is not None)
        try:
            exact = _solution(problems, EXACT_SOLVERS, tokens, why, rejected)
        except PrototypeError:  # too many prototypes, or dependent ones
            if last_resort:
                raise
            rejected.append(f"{tokens} have no exact edit")
            continue
        if alone or last_resort or exact.ordinary_moved <= MAX_COST * request.strength:
            return exact
        rejected.append(f"exact with {tokens} would move them by {100 * exact.ordinary_moved:.1f} %")
    # Softly, more prototypes come nearer to the targets, as long as they do not move ordinary prompts far.
    soft = _solution(problems, ("soft",), choices[0], "soft", rejected)
    if soft.ordinary_moved > MOST_MOVED * request.strength:
        rejected.append(f"soft with {choices[0]} would move them by {100 * soft.ordinary_moved:.1f} %")
        fewer = _solution(problems, ("soft",), choices[-1], "soft", rejected)
        soft = min(soft, fewer, key=lambda solution: solution.ordinary_moved)
    return soft


def _solution(
    problems: Mapping[str, Problem],
    solvers: Sequence[str],
    tokens: str,
    why: str,
    passed_over: Sequence[str] = (),
) -> Solution:
    """
    Solve every space with the prototypes of these tokens, each by the solver that moves ordinary prompts
    least. Raises `PrototypeError` if no solver has an exact edit of a space.
    """
    remaps, reasons, moved = {}, {}, {}
    # Spaces are solved apart: a layer reads one of them, so what is cheap in one says nothing about another.
    for space, problem in problems.items():
        remaps[space], reasons[space] = _solve_space(problem, solvers, tokens)
        for name in problem.retained:
            features = torch.stack([problem.prototypes[part] for part in problem.columns([name], tokens)])
            moved[name] = max(moved.get(name, 0.0), remaps[space].moved(features))
    first, *others = reasons
    parts = [f"{why}, {reasons[first]}", *passed_over]
    # There can be dozens of layers: the most expensive stands for them all.
    layers = [space for space in others if kind_of(space) == "layers"]
    most_expensive = max(layers, key=lambda space: remaps[space].ordinary_moved, default=None)
    for space in others:
        if space == most_expensive or space not in layers:
            label = f"{space}, the most expensive of {len(layers)}" if space == most_expensive else space
            parts.append(f"{label}: {remaps[space].solver}, {reasons[space]}")
    sent_to = _sent_to(problems["tokens"].request, problems["tokens"].experts)
    return Solution(remaps, tokens, "; ".join(parts), moved, sent_to)


def _sent_to(request: ConceptRequest, experts: Sequence[Sequence[str | None]]) -> dict[str, list[str | None]]:
    """Each concept's target in every expert."""
    return {name: [targets[i] for targets in experts] for i, name in enumerate(request.concepts)}


def _solve_space(problem: Problem, solvers: Sequence[str], tokens: str) -> tuple[Remap, str]:
    """The remap of one space, and what it costs. Raises `PrototypeError` if no solver has an exact edit."""
    solved: dict[str, Remap] = {}
    costs = []
    for solver in solvers:
        try:
            solved[solver] = problem.fit(solver, tokens)
        except PrototypeError:  # pinv has more prototypes to keep: too many, or dependent ones
            if solver == solvers[-1] and not solved:
                raise
            costs.append(f"{solver} has no exact edit")
    moved = {solver: remap.ordinary_moved for solver, remap in solved.items()}
    chosen = min(moved, key=moved.get)
    costs += [f"{solver} {100 * value:.2f} %" for solver, value in moved.items()]
    d, k = solved[chosen].prototypes.matrix.shape
    return solved[chosen], f"moves ordinary prompts ({', '.join(costs)}); {k} prototypes in {d} dimensions"
