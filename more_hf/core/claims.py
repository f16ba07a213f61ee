"""What may be said of an erasure: sentences that the report, the card, `verify` and the README share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from .facts import ClassFacts, ConceptFacts, Facts
from .request import EXACT_SOLVERS, ConceptRequest


EXACT = (
    "To rounding, in every layer that reads the prompt: the mean features of prompts that name what was "
    "erased give what those of the target give."
)
NOTHING = (
    "To rounding, in every layer that reads the prompt: the mean features of prompts that name what was "
    "erased without a target give nothing."
)
SOFT = (
    "The mean features of prompts that name what was erased are moved most of the way, so that other prompts "
    "keep more."
)
SCALED = (
    "The edit was scaled by its strength, {:g}: the mean features of prompts that name what was erased go so "
    "much of the way to the target. Whoever knows the names can undo that from the weights alone."
)
INSIDE = (
    "Layers inside the denoiser are fitted by regression, exact in nothing. Their files can only be compared "
    "with what was saved, by a fingerprint."
)
GATED = (
    "Gates in feed-forward layers open on what pictures of the concept gave there, and write a step to the "
    "target. What the denoiser predicts of pictures that fitted no gate, all of them together moved by "
    "{:.0f} % or more for each concept and by {:.0f} % for others. Whoever reads the weights finds in plain "
    "what a gate looks for and what it writes. The files can only be compared with what was saved, by a "
    "fingerprint."
)
RUN = (
    "The model was run: nothing but the edited layers reads the prompt, and each computes with its new "
    "weight."
)
RUN_INSIDE = (
    "The model was run: each edited layer computes with its new weight. The layers that read the prompt were "
    "left as they are, since what was erased was given by pictures without a name."
)
NOT_RUN = (
    "The model was not run: that no other layer reads the prompt is taken from its family's description."
)
SINGLE_PROMPT = (
    "A single prompt moves by as much of that mean as it contains. A paraphrase without the name can keep "
    "some of the concept, and a prompt close to it can lose some of its own."
)
CLASSES = "To rounding: the mean feature of every forgotten class gets the scores of its target."
CLASSES_NOTHING = "To rounding: the mean feature of every class without a target gives nothing in the head."
SINGLE_SAMPLE = "A single sample moves by as much of that mean as it contains."


class Claim(NamedTuple):
    """A sentence about an erasure, under the name of its row in the report."""

    row: str
    sentence: str


def claims_of_concepts(
    request: ConceptRequest, facts: ConceptFacts, guarantees: Mapping[str, float], proof: Mapping[str, float]
) -> Iterator[Claim]:
    """Yield what may be said of an erasure from a pipeline, by what was asked for, done and measured."""
    ran = RUN_INSIDE
    if request.named:
        ran = RUN
        if request.strength != 1:
            ending = f"At worst, they end {_left(guarantees, inside=False)} of the way from it."
            yield Claim("in part", f"{SCALED.format(request.strength)} {ending}")
        elif facts.solver in EXACT_SOLVERS:
            yield from _exact(request.remap_to.values(), EXACT, NOTHING)
        else:
            yield Claim("in part", f"{SOFT} At worst, {_left(guarantees, inside=False)} of the way is left.")
        yield Claim("not exact", SINGLE_PROMPT)
    if request.gated:
        own, others = (100 * guarantees.get(f"gates_move_{whose}", math.nan) for whose in ("own", "others"))
        yield Claim("gates", GATED.format(own, others))
    elif request.inside:
        left = _left(guarantees, inside=True)
        yield Claim("in part, inside", f"{INSIDE} At worst, {left} of the way is left.")
    yield Claim("run", ran if proof else NOT_RUN)


def claims_of_classes(facts: ClassFacts) -> Iterator[Claim]:
    """Yield what may be said of an erasure from a classifier."""
    yield from _exact(facts.sent_to.values(), CLASSES, CLASSES_NOTHING)
    yield Claim("not exact", SINGLE_SAMPLE)


def check_of(facts: Facts, targets: Collection[Collection[str]], strength: float = 1.0) -> str:
    """The name of the check that the layers treat what was erased as they should."""
    if strength != 1:
        return f"each sends p_f {strength:g} of the way"
    if facts.solver not in EXACT_SOLVERS:
        return "each sends p_f most of the way"
    return "each sends p_f where p_t goes" if any(targets) else "each sends p_f to zero"


def _left(guarantees: Mapping[str, float], *, inside: bool) -> str:
    """How much of the way is left at worst, in the layers inside the denoiser or in those that read text."""
    measured = [
        value
        for key, value in guarantees.items()
        if key.endswith("way_left") and key.startswith("denoiser") == inside
    ]
    return f"{100 * max(measured, default=math.nan):.2g} %"


def _exact(targets: Collection[Collection[str]], to_target: str, to_nothing: str) -> Iterator[Claim]:
    if any(targets):
        yield Claim("exact", to_target)
    if not all(targets):
        yield Claim("exact", to_nothing)
