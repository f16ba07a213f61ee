"""Search for edits: cheap figures first, then pictures, few of many edits and more of those that stay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..core.errors import MoreError
from ..core.interrupts import afterwards
from ..core.registry import locked
from ..core.request import ConceptRequest
from ..core.site import Site, copy_weights, put_in_place, write_weights
from ..diffusion.activations import Activations, find_activation_sites, record_activations
from ..diffusion.draw import draw
from ..diffusion.encoder import Encoder, column, kinds_of
from ..diffusion.plan import Solution, fit_request, solve, token_choices
from ..diffusion.sites import find_sites
from .clip import Clip
from .judge import CHANCE, Estimate, Judge, chance_of_moves, features_of, fit_classes, lpips_distance


logger = logging.getLogger(__name__)

MOST = 10  # candidates of which pictures are drawn
ROUNDS = (4, 2, 1)  # a round draws this part of the pictures of each edit that is left
STAY = 3  # edits that stay after a round, or a third of them if these are more
# Other settings for the two best targets, where these move other pictures visibly (LPIPS) and the settings
# move ordinary prompts by at most this part of what the exact edit moves them.
VARIANTS = ({"tokens": "last+end"}, {"solver": "soft"})
VISIBLE, CHEAPER = 0.02, 0.8
FRONT = 6  # edits to choose from
STRENGTHS = (0.25, 0.5, 0.75, 1.25)  # of the recommended edit, beside none of it and the whole
LESS, MORE = ("recognized", "retained", "nameless"), ("kept", "changed")  # figures by which way is better


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a study was asked for. The same setup and model give the same study."""

    concept: str
    aliases: tuple[str, ...]
    reach: str
    pictures: int  # of each name, and of the concept for each edit that stays
    sampling: Mapping[str, Any]
    seed: int
    judge: str  # one of `JUDGES`
    candidates: tuple[str, ...]
    retain: tuple[str, ...] = ()  # names whose pictures should not change
    sentences: tuple[str, ...] = ()  # with `{}` for a name
    nameless: tuple[str, ...] = ()  # prompts that name nobody

    @property
    def names(self) -> list[str]:
        """The names that the judge tells apart, the concept first."""
        return list(dict.fromkeys([self.concept, *self.candidates, *self.retain]))

    def case(self, role: str, number: int, name: str = "") -> Case:
        """One picture; pictures of the same number have the same sentence and noise, whatever their name."""
        if role == "nameless":
            prompt = self.nameless[number % len(self.nameless)]
            return Case(role, number, role, prompt, self.seed + number)
        sentence = self.sentences[number % len(self.sentences)]
        return Case(role, number, name, sentence, self.seed + number)

    def cases(self, count: int) -> list[Case]:
        """The pictures that show an edit: `count` of the concept, and some of the others."""
        kept = [name for name in self.names if name in self.retain]
        return [
            *(self.case("concept", i, self.concept) for i in range(count)),
            *(self.case("retained", i, kept[i % len(kept)]) for i in range(max(2, count // 3))),
            *(self.case("nameless", i) for i in range(max(2, count // 6))),
        ]


class Case(NamedTuple):
    """A picture to draw."""

    role: str  # `"concept"`, `"retained"` or `"nameless"`
    number: int  # among those of its role
    name: str  # of which the original's picture is, `"nameless"` for none
    sentence: str
    seed: int

    @property
    def prompt(self) -> str:
        """The sentence with the name in it; without one, it leaves no gap."""
        return " ".join(self.sentence.replace("{}", self.name).split())


@dataclass(frozen=True)
class Judgment:
    """What became of one picture."""

    edit: str
    role: str
    number: int
    distance: float  # LPIPS to the original's
    recognized: bool = False  # whether the judge still takes it for the concept
    kept: bool = False  # whether it shows what else its sentence asks for
    clip: bool | None = None  # whether CLIP, if asked, still takes it for the concept

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the others of its study."""
        return self.edit, self.role, self.number


@dataclass(frozen=True)
class Figures:
    """What pictures say of an edit."""

    recognized: Estimate  # share of the concept's pictures that are still taken for it
    kept: Estimate  # share of them that show what else the sentence asks for
    changed: Estimate  # LPIPS of the concept's pictures
    retained: Estimate  # LPIPS of retained names' pictures
    nameless: Estimate  # LPIPS of pictures that name nobody
    lost: float  # how much lower `kept` is than the original's
    clip: Estimate | None = None  # `recognized` by CLIP, if it was asked

    @property
    def moved(self) -> float:
        """LPIPS of all pictures that should not change, those of retained names and the others alike."""
        return (self.retained.value + self.nameless.value) / 2

    @property
    def score(self) -> float:
        """How much farther the concept's pictures go than the others, less what is left and what is lost."""
        return self.changed.value - self.moved - self.recognized.value - self.lost

    def beats(self, other: Figures) -> bool:
        """Whether no figure is worse than the other's, and one is better beyond both intervals."""
        better, worse = [], []
        for name in LESS:
            own, its = getattr(self, name), getattr(other, name)
            better.append(own.high < its.low)
            worse.append(own.value > its.value)
        for name in MORE:
            own, its = getattr(self, name), getattr(other, name)
            better.append(own.low > its.high)
            worse.append(own.value < its.value)
        return any(better) and not any(worse)


@dataclass(frozen=True)
class Edit:
    """An edit that is solved but not applied."""

    request: ConceptRequest
    solution: Solution = field(repr=False)
    sites: Mapping[str, Site] = field(repr=False)

    @property
    def key(self) -> str:
        """What tells it from the other edits of its study."""
        request = self.request
        options = {name: getattr(request, name) for name in ("tokens", "solver", "reach", "strength")}
        set_apart = [f"{name} {own}" for name, own in options.items() if own != getattr(ConceptRequest, name)]
        return ", ".join([f"to {' and '.join(request.targets)}", *set_apart])


class Trial(NamedTuple):
    """An edit and what its pictures say."""

    edit: Edit
    figures: Figures


class Workshop:
    """
    A pipeline, and what all edits of a study share: prototypes, moments, original weights, original pictures
    and judges.

    The weights of the original `pipe` change while the pictures of an edit are drawn, and are back
    afterwards. `judged` are the pictures that are judged already; `record` and `progress` get every batch of
    new judgments, and the number of its pictures. `clip` is a second judge, which decides nothing.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        setup: Setup,
        *,
        judged: Iterable[Judgment] = (),
        record: Callable[[Sequence[Judgment]], object] = len,
        progress: Callable[[int], object] = int,
        batch_size: int = 8,
        clip: Clip | None = None,
    ):
        self.pipe, self.setup, self.batch_size, self.clip = pipe, setup, batch_size, clip
        self.judged = {judgment.key: judgment for judgment in judged}
        self.record, self.progress = record, progress
        self.whole = request_of(setup, setup.candidates)
        self.encoder = Encoder.of(pipe, self.whole)
        self.denoiser = self.encoder.denoiser
        self.sites = find_sites(pipe, self.denoiser, pooled=self.whole.pooled)
        self.prototypes = fit_request(self.encoder, self.whole)
        self.activations: dict[str, Activations] = {}  # by target
        self.sentence_judges: dict[str, tuple[Tensor, Tensor]] = {}  # by the name that is left out

    def edit(self, target: str, **options: Any) -> Edit:
        """Solve an edit on the shared prototypes. Draws nothing, unless it reaches into the denoiser."""
        request = replace(self.whole, remap_to={self.setup.concept: (target,)}, **options)
        # 1. Of the shared prototypes, take those of this edit's names and token positions.
        prototypes = {}
        for space, shared in self.prototypes.items():
            left_out = self._columns(self.whole, space) - self._columns(request, space)
            prototypes[space] = shared.without(left_out)
        solution, sites = solve(self.encoder, request, prototypes), dict(self.sites)
        # 2. Inside the denoiser, pictures by the original give the features.
        if request.inside:
            if target not in self.activations:
                sent_to = {self.setup.concept: [target]}
                self.activations[target] = record_activations(self.pipe, self.denoiser, request, sent_to)
            solution = solution.with_activations(self.activations[target], request)
            sites |= find_activation_sites(self.denoiser, self.activations[target].spaces)
        return Edit(request, solution, sites)

    def at_strength(self, edit: Edit, strength: float) -> Edit:
        """A part of an edit, or more than the whole."""
        remaps = {space: replace(remap, strength=strength) for space, remap in edit.solution.remaps.items()}
        request = replace(edit.request, strength=strength)
        return Edit(request, replace(edit.solution, remaps=remaps), edit.sites)

    def _columns(self, request: ConceptRequest, space: str) -> set[str]:
        """The prototypes of a request's names."""
        kinds: set[str] = set()
        for tokens in token_choices(request):
            kinds.update(kinds_of(self.encoder.text, tokens, pooled=True).get(space, ()))
        names = {*request.surfaces, *request.targets, *request.retain}
        return {column(name, kind) for name in names for kind in kinds}

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """The pipeline with an edit inside the block, without a proof. Its weights are back afterwards."""
        before = copy_weights(edit.sites)
        remaps = edit.solution.remaps
        after = {name: remaps[site.space].merged(before[name]) for name, site in edit.sites.items()}

        def undo() -> None:
            write_weights(edit.sites, before)
            put_in_place(edit.sites, False)

        with locked(self.denoiser.module), afterwards(undo):
            put_in_place(edit.sites)
            write_weights(edit.sites, after)
            yield

    def draw(self, cases: Sequence[Case]) -> Iterator[tuple[Sequence[Case], Tensor]]:
        """Yield batches of cases and their pictures."""
        for first in range(0, len(cases), self.batch_size):
            batch = cases[first : first + self.batch_size]
            prompts, seeds = [case.prompt for case in batch], [case.seed for case in batch]
            yield batch, draw(self.pipe, prompts, seeds, self.setup.sampling)
            self.progress(len(batch))

    def draw_originals(self) -> dict[str, Tensor]:
        """Draw what the original makes of the concept, of every other name, and without a name."""
        originals = {}
        for name, cases in original_cases(self.setup).items():
            originals[name] = torch.cat([pictures for _, pictures in self.draw(cases)])
        return originals

    def fit_judges(self, originals: Mapping[str, Tensor]) -> None:
        """
        Fit a judge of names on the original's pictures, and measure how many of the concept's show what else
        their sentence asks for.

        Raises:
            `MoreError`: the judge cannot tell the concept.
        """
        setup, self.originals = self.setup, originals
        self.features = {name: features_of(originals[name]) for name in setup.names}
        self.names_judge = Judge.of_features(self.features)
        own = self.features[setup.concept]
        shown = self.shows_sentence(own, range(len(own)), setup.concept)
        self.kept_before = Estimate.share(sum(shown), len(shown))
        self.clip_before = self.clip and Estimate.share(
            self.taken_by_clip(originals[setup.concept], range(len(own))).count(setup.concept), len(own)
        )
        judge, concept = self.names_judge, setup.concept
        drawn = chance_of_moves(features_of(originals["unnamed"]), own)
        self.chances = {"told": judge.chance(concept), "drawn": drawn}
        if drawn >= CHANCE:
            logger.warning("%s", says_not_drawn(concept, drawn))
        if not judge.can_tell(concept):
            raise MoreError(
                f"The judge cannot tell {concept!r} from {len(setup.names) - 1} other names: it finds "
                f"{judge.found(concept).percent} of the pictures that it did not see, and one that knows "
                f"nothing would do as well with probability {judge.chance(concept):.2f}. Name `candidates` "
                "that look different, or draw more `pictures`."
            )

    def shows_sentence(self, features: Tensor, numbers: Sequence[int], style: str) -> list[bool]:
        """
        Whether pictures of these numbers show what else their sentence asks for. The judge of sentences is
        fitted without pictures of the name whose style they are in: what that does to a thing counts.
        """
        setup = self.setup
        if style not in self.sentence_judges:
            whole = setup.pictures // len(setup.sentences) * len(setup.sentences)
            by_sentence: list[list[Tensor]] = [[] for _ in setup.sentences]
            for number in range(whole):
                others = [self.features[name][number] for name in setup.names if name != style]
                by_sentence[number % len(setup.sentences)] += others
            z = torch.stack([torch.stack(own) for own in by_sentence])
            self.sentence_judges[style] = fit_classes(z)
        weight, bias = self.sentence_judges[style]
        taken_for = (features @ weight.T + bias).argmax(1).tolist()
        return [i == n % len(setup.sentences) for i, n in zip(taken_for, numbers, strict=True)]

    def taken_by_clip(self, pictures: Tensor, numbers: Sequence[int]) -> list[str]:
        """The name with which a picture's sentence is nearest to it for CLIP."""
        names, taken_for = self.setup.names, []
        for z, number in zip(self.clip.embed(pictures), numbers, strict=True):
            prompts = [self.setup.case("concept", number, name).prompt for name in names]
            taken_for.append(names[int((self.clip.encode(prompts) @ z).argmax())])
        return taken_for

    def trial(self, edit: Edit, count: int) -> Trial:
        """What the pictures of an edit say."""
        return Trial(edit, self.figures(self.judgments(edit, self.setup.cases(count))))

    def recognized_at(self, edit: Edit, strength: float) -> Estimate:
        """The share of half the concept's pictures that are taken for it after a part of an edit."""
        cases = self.setup.cases(self.setup.pictures // 2)
        concept = [case for case in cases if case.role == "concept"]
        judgments = self.judgments(self.at_strength(edit, strength), concept)
        return Estimate.share(sum(judgment.recognized for judgment in judgments), len(judgments))

    def judgments(self, edit: Edit, cases: Sequence[Case]) -> list[Judgment]:
        """Draw and judge the pictures of an edit that were not judged before."""
        missing = [case for case in cases if (edit.key, case.role, case.number) not in self.judged]
        if missing:
            with self.edited(edit):
                for batch, after in self.draw(missing):
                    judgments = self._judge(edit, batch, after)
                    self.record(judgments)
                    self.judged |= {judgment.key: judgment for judgment in judgments}
        return [self.judged[edit.key, case.role, case.number] for case in cases]

    def _judge(self, edit: Edit, batch: Sequence[Case], after: Tensor) -> list[Judgment]:
        before = torch.stack([self.originals[case.name][case.number] for case in batch])
        distances = lpips_distance(before, after).tolist()
        z = features_of(after)
        numbers, (target,) = [case.number for case in batch], edit.request.targets
        names = self.names_judge.taken_for(z, numbers)
        shown = self.shows_sentence(z, numbers, target)
        by_clip = self.taken_by_clip(after, numbers) if self.clip else [None] * len(batch)
        judgments = []
        for case, distance, *taken_for, kept in zip(batch, distances, names, by_clip, shown, strict=True):
            seen = {}
            if case.role == "concept":
                recognized, clip = (name and name == case.name for name in taken_for)
                seen = {"recognized": recognized, "kept": kept, "clip": clip}
            judgments.append(Judgment(edit.key, case.role, case.number, round(distance, 6), **seen))
        return judgments

    def figures(self, judgments: Sequence[Judgment]) -> Figures:
        """The means of judgments, with their intervals."""
        by_role: dict[str, list[Judgment]] = {"concept": [], "retained": [], "nameless": []}
        for judgment in judgments:
            by_role[judgment.role].append(judgment)
        concept = by_role["concept"]
        distances = {}
        for role, own in by_role.items():
            distances[role] = Estimate.mean(torch.tensor([judgment.distance for judgment in own]))
        kept = Estimate.share(sum(judgment.kept for judgment in concept), len(concept))
        clip = self.clip and Estimate.share(sum(judgment.clip for judgment in concept), len(concept))
        return Figures(
            recognized=Estimate.share(sum(judgment.recognized for judgment in concept), len(concept)),
            kept=kept,
            changed=distances["concept"],
            retained=distances["retained"],
            nameless=distances["nameless"],
            lost=max(0.0, self.kept_before.value - kept.value),
            clip=clip,
        )


def says_not_drawn(concept: str, drawn: float) -> str:
    """A warning for a name without which a model draws about the same."""
    return (
        f"The model may not know {concept!r}: its pictures differ from those of the same sentences and noise "
        f"without a name in nothing that they have in common (p = {drawn:.2f}). Check the spelling, and look "
        "at the sheet."
    )


def request_of(setup: Setup, targets: Sequence[str]) -> ConceptRequest:
    """The request that sends a study's concept to targets."""
    sampling = setup.sampling if setup.reach == "denoiser" else None  # else the edit draws nothing
    concepts = {setup.concept: setup.aliases}
    return ConceptRequest.of(concepts, remap_to=targets, retain=setup.retain, sampling=sampling)


def original_cases(setup: Setup) -> dict[str, list[Case]]:
    """The pictures that the original draws: by name, in the same sentences without one, and in others."""
    cases = {}
    for name in setup.names:
        cases[name] = [setup.case("concept", i, name) for i in range(setup.pictures)]
    cases["unnamed"] = [setup.case("concept", i) for i in range(setup.pictures)]
    cases["nameless"] = [setup.case("nameless", i) for i in range(max(2, setup.pictures // 6))]
    return cases


def spread_candidates(pipe: DiffusionPipeline, setup: Setup) -> tuple[str, ...]:
    """
    Of more candidates than can be drawn, those evenly spaced from the one that moves ordinary prompts least
    to the one that moves them most: a cheap figure, without a picture.
    """
    workshop = Workshop(pipe, replace(setup, retain=()))
    moved = {target: workshop.edit(target).solution.ordinary_moved for target in setup.candidates}
    ordered = sorted(moved, key=moved.get)
    return tuple(ordered[i * (len(ordered) - 1) // (MOST - 1)] for i in range(MOST))


def search(workshop: Workshop) -> list[Trial]:
    """
    Successive halving: every target with few pictures, then the better ones, in other settings too, with
    more. Returns the last round's trials, best first.
    """
    setup = workshop.setup
    edits = [workshop.edit(target) for target in setup.candidates]
    trials: list[Trial] = []
    for part in ROUNDS:
        trials = [workshop.trial(edit, setup.pictures // part) for edit in edits]
        trials.sort(key=lambda trial: -trial.figures.score)
        edits = [trial.edit for trial in trials[: max(STAY, len(trials) // 3)]]
        if part == ROUNDS[0]:
            edits += _variants(workshop, trials[:2])
    return trials


def _variants(workshop: Workshop, trials: Sequence[Trial]) -> list[Edit]:
    """The same targets in other settings, where these may cost less or reach farther."""
    variants = []
    for edit, figures in trials:
        (target,) = edit.request.targets
        for options in VARIANTS if figures.moved > VISIBLE else ():
            other = workshop.edit(target, **options)
            if other.solution.ordinary_moved <= CHEAPER * edit.solution.ordinary_moved:
                variants.append(other)
        if workshop.setup.reach == "denoiser":
            variants.append(workshop.edit(target, reach="denoiser"))
    return variants


def front(trials: Sequence[Trial]) -> list[Trial]:
    """At most `FRONT` trials that no other beats, best first."""
    beaten = [any(other.figures.beats(trial.figures) for other in trials) for trial in trials]
    return [trial for trial, worse in zip(trials, beaten, strict=True) if not worse][:FRONT]
