"""Facts about an erasure: what was measured or decided, in typed fields that go to JSON and back."""

from __future__ import annotations

from dataclasses import dataclass, field


# What gates take the place of in a feed-forward layer: rows of the linear layer in front, which reads, and of
# its bias; and columns of the one behind, which writes. These have no space of features.
READERS, STEPS = "readers of gates", "steps of gates"


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
    """What was measured or decided when a model was erased, ready for JSON."""

    solver: str  # the one that was used, where `"auto"` was asked for
    solver_reason: str  # why that one, in words and numbers
    rank: int  # of an edited layer's change: the number of forget prototypes
    num_experts: int
    condition_number: float  # of the prototypes, scaled to unit norm
    base: str  # where the original was loaded from; empty if unknown
    fingerprint: str  # sha256 of the edited layers before the edit
    # the space that each edited layer reads, for layers that do not read the prompt's tokens
    spaces: dict[str, str]
    base_revision: str | None = None  # the commit that the original was loaded from


@dataclass(frozen=True, kw_only=True)
class ConceptFacts(Facts):
    """The facts of a pipeline."""

    pipeline: str  # its class
    device: str  # where the prototypes were made: its kind, and which one
    # the farthest that any prototype of each retained name moved, as a share of its length
    retained_moved: dict[str, float]
    leaks: list[str]  # what the edit does not cover, in words and numbers
    tokens: str | None = None  # the token positions that made prototypes, if they are fewer than requested
    # the precision of each text encoder that made the prototypes, and how it is quantized
    fitted_on: dict[str, str] = field(default_factory=dict)
    dequantized: dict[str, str] = field(default_factory=dict)  # how each plain layer was quantized before
    extra_bytes: int = 0  # how much more memory these layers take
    study: list[dict[str, str]] = field(default_factory=list)  # the edits that `tune` gave to choose from
    judged: str = ""  # what the figures in these lines are


@dataclass(frozen=True, kw_only=True)
class ClassFacts(Facts):
    """The facts of a classifier."""

    model: str  # its class
    num_classes: int  # how many it tells apart, the forgotten ones included
    sent_to: dict[str, list[str]]  # the targets that were drawn for each forgotten class
    # how far each prototype that was not kept exactly moved, as a share of its length, farthest first
    remain_moved: dict[str, float]
    # the percentage of the remaining classes' features, drawn around their prototypes, that the head
    # assigns to the right class, `before` and `after` the edit; `None` for an edit at an inner module
    remain_right: dict[str, float] | None = None
    # of each class in `measured_on`, the number of samples and the percentage of them that is classified
    # rightly: `images`, `before`, `after`
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    # of each forgotten class, the percentage of its samples that the model gives to other classes now
    became: dict[str, dict[str, float]] = field(default_factory=dict)
    measured_on: str = ""  # samples that the user named
