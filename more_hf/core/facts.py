"""Facts about an erasure: what was measured or decided, in typed fields that go to JSON and back."""

from __future__ import annotations

from dataclasses import dataclass


def kind_of(space: str) -> str:
    """
    The kind of a pipeline's space of features. From the prompt come `"tokens"`, `"pooled"` and `"layers"`,
    the tokens after single layers of a language model; all others are activations inside the `"denoiser"`.
    """
    if space in ("tokens", "pooled"):
        return space
    return "layers" if space.startswith("tokens of ") else "denoiser"


def is_text(space: str) -> bool:
    """Whether a pipeline's space of features comes from the prompt."""
    return kind_of(space) != "denoiser"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was measured or decided when a model was erased, ready for JSON.

    Args:
        solver (`str`):
            The solver that was used.
        solver_reason (`str`):
            Why that one, in words and numbers.
        rank (`int`):
            Number of forget prototypes, which is the rank of an edited layer's change.
        num_experts (`int`):
            Number of experts.
        condition_number (`float`):
            Condition number of the prototypes, scaled to unit norm.
        base (`str`):
            Where the original was loaded from; empty if unknown.
        fingerprint (`str`):
            sha256 of the edited layers before the edit.
        spaces (`dict[str, str]`):
            The space that each edited layer reads, for layers that do not read the prompt's tokens.
        base_revision (`str`, *optional*):
            The commit that the original was loaded from.
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


@dataclass(frozen=True, kw_only=True)
class ConceptFacts(Facts):
    """
    The facts of a pipeline.

    Args:
        pipeline (`str`):
            The pipeline's class.
        retained_moved (`dict[str, float]`):
            The farthest that any prototype of each retained name moved, as a share of its length.
        leaks (`list[str]`):
            What the edit does not cover, in words and numbers.
        tokens (`str`, *optional*):
            The token positions that made prototypes, if they are fewer than requested.
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
            The classifier's class.
        num_classes (`int`):
            Number of classes it tells apart.
        sent_to (`dict[str, list[str]]`):
            The targets that were drawn for each forgotten class.
        remain_moved (`dict[str, float]`):
            How far each prototype that was not kept exactly moved, as a share of its length, farthest first.
        remain_right (`dict[str, float]`, *optional*):
            The percentage of the remaining classes' features, drawn around their prototypes, that the head
            assigns to the right class, `before` and `after` the edit; `None` for an edit at an inner module.
    """

    model: str
    num_classes: int
    sent_to: dict[str, list[str]]
    remain_moved: dict[str, float]
    remain_right: dict[str, float] | None = None
