"""
The configuration of a benchmark of artists: the kind of concept that it forgets, how its pictures were
generated, its methods and their arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from ..errors import BenchmarkError
from ..methods.registry import DIFFUSION, UNREGISTERED
from ..run import BenchmarkConfig


@dataclass(frozen=True)
class Kind:
    """One kind of concept. A prompt may name an artist, a thing or both; one of the two is forgotten."""

    name: str  # its name for `kind`, in the plural
    one: str  # the singular, which is also its column in prompts and rows
    # the judgement that must no longer find what is forgotten: `"style"` or `"content"`, as in the columns'
    # names
    gone: str
    kept: str  # the other judgement of the same pictures
    # the pictures that must still show what their prompts ask for, for a method to qualify: the forgotten
    # ones, or the others
    spared: Literal["f", "r"]
    condition: str  # the condition to qualify, in words, with places for the two limits in percent


ARTISTS = Kind(
    name="artists",
    one="artist",
    gone="style",
    kept="content",
    spared="f",
    condition="leave the style in at most {:g} % of the forgotten artist's pictures (style_f) and keep "
    "what they show in at least {:g} % of those that showed it before (content_f)",
)
THINGS = Kind(
    name="things",
    one="thing",
    gone="content",
    kept="style",
    spared="r",
    condition="leave the thing in at most {:g} % of the forgotten things' pictures (content_f) and keep "
    "the others in at least {:g} % of those that showed theirs before (content_r)",
)
KINDS = {kind.name: kind for kind in (ARTISTS, THINGS)}


JOINT = "+"  # joins the names in an entry of `forget` that are erased in one call


@dataclass(frozen=True)
class Generation:
    """
    Everything that the original's pictures depend on besides prompt and seed.

    Attributes:
        more_hf (`str`):
            The version of more_hf.
        weights (`str`):
            sha256 of the pipeline's weights.
        scheduler (`Mapping[str, Any]`):
            The scheduler's class and settings.
        steps, guidance, dtype, device:
            As in [`~more_hf_bench.artists.run.run_artists`].
        prompts, prompts_sha256 (`str`):
            Name of the prompts file, and the hash of its bytes.
    """

    more_hf: str
    weights: str
    scheduler: Mapping[str, Any]
    steps: int
    guidance: float
    dtype: str
    device: str
    prompts: str
    prompts_sha256: str


@dataclass(frozen=True)
class MethodArguments:
    """The names that one method gets for one erasure: its targets, and the names to keep besides them."""

    remap_to: list[str] | None
    retain: list[str]


@dataclass(frozen=True)
class Erasure:
    """The names that belong to one entry of `forget`."""

    remap_to: list[str] | None  # the target, or targets, of most methods; `None` erases without remapping
    several: list[str] | None  # the targets of methods that take several; `None` if there are none
    retain: list[str]  # names to keep
    names: list[str] | None = None  # the forgotten names, if the entry is only a label for them
    # method -> settings that it has for this erasure only
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cases: list[int] | None = None  # the case numbers of its prompts; `None` for all

    def forgotten(self, entry: str) -> list[str]:
        """The names that are forgotten."""
        return artists_of(entry) if self.names is None else self.names

    def arguments(self, method: str, forget: str) -> MethodArguments:
        """
        Choose the names that a method gets.

        Raises:
            BenchmarkError: if the method takes several targets and there are none.
        """
        kind = DIFFUSION.get(method, UNREGISTERED).targets
        targets = {"none": None, "one": self.remap_to, "several": self.several}[kind]
        if targets is None and kind == "several":
            raise BenchmarkError(
                f"{method} needs several targets, and there are none for {forget!r}. "
                "Give them, or leave the method out."
            )
        return MethodArguments(targets, [name for name in self.retain if name not in (targets or ())])

    @property
    def target_text(self) -> str:
        """The targets as text."""
        return ", ".join(self.remap_to or ["nothing"])


@dataclass(frozen=True)
class ArtistsConfig(BenchmarkConfig):
    """`config.json` of a benchmark of artists."""

    benchmark: ClassVar[str] = "artists"
    FIXED: ClassVar[tuple[str, ...]] = ("generation", "seeds", "limit", "judges", "kind")

    more_hf: str
    model: str
    generation: Generation
    lpips: str
    seeds: int
    limit: int | None
    judges: str | None
    judge_facts: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    forget: Mapping[str, Erasure]
    runs: Sequence[Mapping[str, Any]]
    kind: str = ARTISTS.name

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ArtistsConfig:
        """Build from what `to_dict` returned."""
        return replace(
            cls(**data),
            generation=Generation(**data["generation"]),
            forget={forget: Erasure(**names) for forget, names in data["forget"].items()},
        )

    def arguments(self, method: str, forget: str) -> MethodArguments:
        """The names that a method is given for one erasure; raises as `Erasure.arguments`."""
        return self.forget[forget].arguments(method, forget)

    def determining(self, method: str, forget: str) -> list[Any]:
        """Everything that a method's pictures depend on, in the order in which it is hashed."""
        arguments = asdict(self.arguments(method, forget))
        if self.forget[forget].names is not None:
            arguments["names"] = self.forget[forget].names
        return [asdict(self.generation), method, self.settings(method, forget), forget, arguments]

    def settings(self, method: str, forget: str) -> dict[str, Any]:
        """The settings of a method for one erasure."""
        return {**self.methods[method], **self.forget[forget].settings.get(method, {})}

    @property
    def of_kind(self) -> Kind:
        """What is forgotten: artists or things."""
        return KINDS[self.kind]

    @property
    def generation_text(self) -> str:
        """How the pictures were generated, for a reader."""
        made = self.generation
        return f"{made.scheduler['class']}, {made.steps} steps, guidance {made.guidance:g}"

    @property
    def targets_text(self) -> list[str]:
        """Every entry of `forget` with its targets, for a reader."""
        return [f"{forget} → {erasure.target_text}" for forget, erasure in self.forget.items()]


def artists_of(forget: str) -> list[str]:
    """The names in one entry of `forget`."""
    return forget.split(JOINT)
