"""What was measured or decided when a model was erased: typed, JSON both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


# a pipeline's spaces of features that come from the prompt; all others are activations inside the denoiser
TEXT_SPACES = ("tokens", "pooled")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was measured or decided when a model was erased, ready for JSON.

    Args:
        solver (`str`):
            The solver that was used.
        solver_reason (`str`):
            Why, in words and numbers.
        rank (`int`):
            Number of forget prototypes, the rank of the change of an edited layer.
        num_experts (`int`):
            Number of experts.
        condition_number (`float`):
            Of the prototypes, scaled to unit norm.
        base (`str`):
            Where the original was loaded from; empty if unknown.
        fingerprint (`str`):
            sha256 of the edited layers before the edit.
        spaces (`dict[str, str]`):
            The space that an edited layer reads, where it is not the prompt's tokens.
        base_revision (`str`, *optional*):
            The commit that the original was loaded from.
        benchmark (`list`, *optional*):
            Rows of a benchmark that were published with the model.
    """

    solver: str
    solver_reason: str
    rank: int
    num_experts: int
    condition_number: float
    base: str
    fingerprint: str
    spaces: dict[str, str]
    base_revision: str | None = None
    benchmark: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class ConceptFacts(Facts):
    """
    The facts of a pipeline.

    Args:
        pipeline (`str`):
            Its class.
        retained_moved (`dict[str, float]`):
            How far each retained name's prototypes moved at most, as a share of their length.
        leaks (`list[str]`):
            What the edit does not cover, in words and numbers.
        tokens (`str`, *optional*):
            The token positions that made prototypes, where they are fewer than was asked for.
    """

    pipeline: str
    retained_moved: dict[str, float]
    leaks: list[str]
    tokens: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClassFacts(Facts):
    """
    The facts of a classifier.

    Args:
        model (`str`):
            Its class.
        num_classes (`int`):
            Number of its classes.
        sent_to (`dict[str, list[str]]`):
            The targets that were drawn for each forgotten class.
        remain_moved (`dict[str, float]`):
            How far the prototypes moved that were not kept exactly, farthest first, as a share of their
            length.
        remain_right (`dict[str, float]`, *optional*):
            The percentage of the remaining classes' features that the head gives to their class, `before` the
            edit and `after`, of features drawn around the prototypes; `None` at an inner module.
    """

    model: str
    num_classes: int
    sent_to: dict[str, list[str]]
    remain_moved: dict[str, float]
    remain_right: dict[str, float] | None = None
