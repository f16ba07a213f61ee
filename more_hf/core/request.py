"""The user's request: frozen, checked on creation, convertible to JSON and back, for refits and records."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from operator import index
from typing import Any, ClassVar, Literal, Self, SupportsIndex, get_args

from .errors import PrototypeError, shown
from .pictures import Pictures


Solver = Literal["pinv", "covariance", "soft"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
EXACT_SOLVERS: tuple[Solver, ...] = ("pinv", "covariance")

RouterName = Literal["random", "hash", "prototype", "prototype_random"]
ROUTERS: tuple[RouterName, ...] = get_args(RouterName)

Tokens = Literal["positions", "last+end", "subject", "end", "subject+end", "last"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)

Reach = Literal["name", "denoiser", "gates"]
REACHES: tuple[Reach, ...] = get_args(Reach)
TRIED_REACHES: tuple[Reach, ...] = ("name", "denoiser")  # by `tune`
FEWEST_FOR_GATES = 4  # pictures of a name: some fit the gates, some are held out (`diffusion.gates.ROLES`)

JudgeKind = Literal["own", "clip"]
JUDGES: tuple[JudgeKind, ...] = get_args(JudgeKind)
CLIP = ("ViT-L-14-quickgelu", "openai")  # model and weights as open_clip names them

EncoderBits = Literal["8bit", "4bit"]
ENCODER_BITS: tuple[EncoderBits, ...] = get_args(EncoderBits)

REMAIN: Literal["remain"] = "remain"

STRONGEST = 1.5  # such an edit passes its target by half of the way

# arguments of a pipeline's call that the edit itself sets
DRAWN_WITH = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to forget and how, for pipelines and classifiers alike.

    Raises:
        `PrototypeError`: a value has the wrong type or is out of range.
    """

    concepts: Mapping[str, tuple[str, ...]]  # each forgotten name and its aliases, which share its target
    # for each forgotten name, the names it may be sent to; an empty tuple erases without remapping
    remap_to: Mapping[str, tuple[str, ...] | str]
    solver: str = "auto"  # `"auto"` or one of the class's `solvers`
    # how many experts draw targets; `None` for the number that uses each target equally often
    num_experts: int | None = None
    router: str | None = None  # one of `ROUTERS`; `None` for the mean expert alone
    seed: int = 0  # of the draw of targets

    # the user's name for the argument `concepts`
    named_by: ClassVar[str] = "concepts"
    solvers: ClassVar[tuple[str, ...]] = SOLVERS

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, ("auto", *self.solvers))
        check_choice("router", self.router, (None, *ROUTERS))
        if self.num_experts is not None:
            self._set("num_experts", read_count("num_experts", self.num_experts))
        self._set("seed", index(self.seed))
        if not self.concepts:
            raise PrototypeError(f"`{self.named_by}` is empty. Name at least one.")
        if self.concepts.keys() != self.remap_to.keys():
            raise PrototypeError(
                f"`remap_to` is for {list(self.remap_to)}, but {list(self.concepts)} are forgotten. "
                "Give every forgotten name its targets."
            )

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)  # the way to normalize a field of a frozen dataclass

    def joined(self, later: Self, **changes: Any) -> Self:
        """This request together with a later one, whose options take precedence except for the changes."""
        return replace(
            later,
            concepts={**self.concepts, **later.concepts},
            remap_to={**self.remap_to, **later.remap_to},
            **changes,
        )

    def without(self, names: Iterable[str], **changes: Any) -> Self:
        """The request with some names no longer forgotten, and other changes."""
        dropped = set(names)
        kept = [name for name in self.concepts if name not in dropped]
        return replace(
            self,
            concepts={name: self.concepts[name] for name in kept},
            remap_to={name: self.remap_to[name] for name in kept},
            **changes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """
        The inverse of `to_dict`, also after a round trip through JSON. Ignores keys of newer versions.

        Raises:
            `PrototypeError`: a mandatory key is missing, or a value has the wrong type.
        """
        if not isinstance(data, Mapping):
            raise PrototypeError(f"A request must be a mapping, got {type(data).__name__}.")
        if missing := [name for name in ("concepts", "remap_to") if name not in data]:
            raise PrototypeError(f"The request lacks {missing[0]!r}. Add it.")
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        known["concepts"] = read_mapping("concepts", data["concepts"], read_names)
        known["remap_to"] = read_mapping("remap_to", data["remap_to"], cls.read_targets)
        return cls(**known)

    @classmethod
    def read_targets(cls, argument: str, value: Any) -> tuple[str, ...] | str:
        """One concept's targets as the request holds them."""
        return read_names(argument, value)


@dataclass(frozen=True, kw_only=True)
class ConceptRequest(Request):
    """
    What to forget in a text-to-image pipeline: the arguments of `erase_concept`, with their defaults.

    Raises:
        `PrototypeError`: as from `Request`, or a name is blank, given twice, or both forgotten and kept.
    """

    retain: tuple[str, ...] = ()  # names whose prompts must move little, or not at all under `pinv`
    tokens: str = "positions"  # one of `TOKENS`: which prompt positions make prototypes
    pooled: bool = True  # whether to edit the layer that reads the pooled prompt embedding
    templates: tuple[str, ...] | None = None  # sentences with `{}` for a name; `None` for the package's
    everyday: tuple[str, ...] | None = None  # ordinary prompts behind Σ; `None` for the package's
    shrinkage: float = 1e-4  # added to the diagonal of Σ, as a fraction of its mean eigenvalue
    # for solver `"soft"` and inside the denoiser: the weight of ordinary features against forgotten ones
    softness: float = 1.0
    strength: float = 1.0  # the change of each weight is multiplied by this, up to `STRONGEST`
    # one of `REACHES`: how far into the model the edit goes; a mapping gives a concept its own. Inside the
    # denoiser, all go by the same way
    reach: str | Mapping[str, str] = "name"
    # how many pictures of each name give the prototypes inside the denoiser: as many as are given, or more
    pictures: int = 32
    # arguments of the pipeline's call that draws these pictures
    sampling: Mapping[str, int | float | bool | str] | None = None
    given: Mapping[str, Pictures] | None = None  # the concepts that are given by pictures

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tokens", self.tokens, TOKENS)
        if not isinstance(self.pooled, bool):
            raise PrototypeError(f"`pooled` must be True or False, got {self.pooled!r}.")
        check_number("shrinkage", self.shrinkage)
        check_number("softness", self.softness)
        _check_strength(self)
        self._set("reach", _read_reach(self.reach, self.concepts))
        self._set("given", {} if self.given is None else dict(self.given))
        numbers = [given.number for given in self.given.values()]
        self._set("pictures", max([read_count("pictures", self.pictures), *numbers]))
        self._set("sampling", {} if self.sampling is None else _read_sampling(self.sampling))
        for lines in ("templates", "everyday"):
            if getattr(self, lines) is not None:
                self._set(lines, read_names(lines, getattr(self, lines)))
        _check_names(self)
        _check_given(self)
        _check_gates(self)
        for template in self.templates or ():
            if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
                raise PrototypeError(
                    f"A template needs one `{{}}` for the name and no other brace, got {shown(template)}."
                )

    @classmethod
    def of(cls, concepts: Any, *, remap_to: Any, retain: Any = None, **options: Any) -> Self:
        """
        Build a request from the arguments of `erase_concept`, in any of their forms.

        Raises:
            `PrototypeError`: an argument has the wrong type or is out of range, or `remap_to` is empty or
            maps names other than the forgotten ones.
        """
        concepts, given = _with_names(concepts)
        options["given"] = {**(options.get("given") or {}), **given}
        if isinstance(concepts, Mapping):
            forgotten = read_mapping("concepts", concepts, read_names)
        else:
            forgotten = dict.fromkeys(read_names("concepts", concepts), ())
        return cls(
            concepts=forgotten,
            remap_to=_targets_of(forgotten, remap_to),
            retain=read_names("retain", retain),
            **options,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """See `Request.from_dict`."""
        lists = ("retain", "templates", "everyday")
        read = {name: read_names(name, data[name]) for name in lists if data.get(name) is not None}
        read["given"] = read_mapping("given", data.get("given", {}), Pictures.from_dict)
        return super().from_dict({**data, **read})

    def joined(self, later: Self) -> Self:
        """See `Request.joined`. Retained names stay retained, and edited layers stay edited."""
        earlier = {name: given for name, given in self.given.items() if name not in later.concepts}
        return super().joined(
            later,
            retain=tuple(dict.fromkeys([*self.retain, *later.retain])),
            pooled=self.pooled or later.pooled,
            reach=_farther(self.reach, later.reach),
            sampling=later.sampling or self.sampling,
            given={**earlier, **later.given},
        )

    def without(self, names: Iterable[str]) -> Self:
        """See `Request.without`."""
        reach, dropped = self.reach, set(names)
        if not isinstance(reach, str):
            reach = {name: own for name, own in reach.items() if name not in dropped}
        given = {name: pictures for name, pictures in self.given.items() if name not in dropped}
        return super().without(dropped, reach=reach, given=given)

    def to_dict(self) -> dict[str, Any]:
        """See `Request.to_dict`. Of given pictures it has the number and hash, but not the folder."""
        return {**asdict(self), "given": {name: given.to_dict() for name, given in self.given.items()}}

    @property
    def named(self) -> dict[str, tuple[str, ...]]:
        """The concepts that prompts have a name for, with their aliases."""
        nameless = [name for name, given in self.given.items() if given.name is None]
        return {name: aliases for name, aliases in self.concepts.items() if name not in nameless}

    def reach_of(self, name: str) -> str:
        """How far into the model a concept's edit goes."""
        return self.reach if isinstance(self.reach, str) else self.reach.get(name, "name")

    @property
    def inside(self) -> list[str]:
        """The concepts for which layers inside the denoiser are edited, too."""
        return [name for name in self.concepts if self.reach_of(name) != "name"]

    @property
    def gated(self) -> bool:
        """Whether these layers get gates."""
        return any(self.reach_of(name) == "gates" for name in self.concepts)

    @property
    def surfaces(self) -> list[str]:
        """Every forgotten form: each concept's name, followed by its aliases."""
        forms = []
        for name, aliases in self.named.items():
            forms += [name, *aliases]
        return forms

    @property
    def targets(self) -> list[str]:
        """Every name that a concept may be sent to, without repeats."""
        return list(dict.fromkeys(name for names in self.remap_to.values() for name in names))


@dataclass(frozen=True, kw_only=True)
class ClassRequest(Request):
    """
    What to forget in a classifier: the arguments of `erase_classes`, classes by name.

    Args:
        remap_to:
            As in `Request`; `"remain"` in place of a tuple stands for every class that is not forgotten.
        head (`tuple[str, ...]`):
            Names of the edited heads.
        at (`str`, *optional*):
            Name of an inner module whose input is edited instead of the heads'.
    """

    head: tuple[str, ...]
    at: str | None = None

    named_by: ClassVar[str] = "forget"
    solvers: ClassVar[tuple[str, ...]] = EXACT_SOLVERS  # the hook on the head's input needs G2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.at, str | None):
            raise PrototypeError(f"`at` must be the name of a module, got {shown(self.at)}.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """See `Request.from_dict`."""
        if "head" not in data:
            raise PrototypeError("The request lacks 'head'. Add it.")
        return super().from_dict({**data, "head": read_names("head", data["head"])})

    @classmethod
    def read_targets(cls, argument: str, value: Any) -> tuple[str, ...] | str:
        """See `Request.read_targets`."""
        return REMAIN if is_remain(value) else read_names(argument, value)

    @property
    def targets(self) -> list[str]:
        """Every class that is named as a target, without repeats; none for `"remain"`."""
        named = [names for names in self.remap_to.values() if not is_remain(names)]
        return list(dict.fromkeys(name for names in named for name in names))


def with_options(function: Callable) -> Callable:
    """Decorate a function of `**options`: its signature, in `help` and editors, shows `ConceptRequest`'s."""
    own = inspect.signature(function)
    parameters = [part for part in own.parameters.values() if part.kind is not part.VAR_KEYWORD]
    # what the function names itself keeps its own default and place
    for name, option in inspect.signature(ConceptRequest).parameters.items():
        if name not in own.parameters:
            parameters.append(option)
    function.__signature__ = own.replace(parameters=parameters)
    return function


def _with_names(concepts: Any) -> tuple[Any, dict[str, Pictures]]:
    """The argument `concepts` with names in place of pictures, and the pictures by name."""
    if isinstance(concepts, Pictures):
        return concepts.label, {concepts.label: concepts}
    if isinstance(concepts, str) or not isinstance(concepts, Iterable):
        return concepts, {}
    listed = list(concepts)
    names = [one.label if isinstance(one, Pictures) else one for one in listed]
    given = {name: one for name, one in zip(names, listed, strict=True) if isinstance(one, Pictures)}
    if twice := [name for name in given if names.count(name) > 1]:
        raise PrototypeError(f"Two concepts are called {twice[0]!r}. Give `Pictures` another name or folder.")
    if isinstance(concepts, Mapping):
        return dict(zip(names, concepts.values(), strict=True)), given
    return names, given


def _targets_of(forgotten: Iterable[str], remap_to: Any) -> dict[str, tuple[str, ...]]:
    """Each forgotten name's targets, given either the same targets for all or a mapping."""
    if not isinstance(remap_to, Mapping):
        return dict.fromkeys(forgotten, _read_some("remap_to", remap_to))
    targets = read_mapping("remap_to", remap_to, _read_some)
    names = list(forgotten)
    if unknown := [name for name in targets if name not in names]:
        raise PrototypeError(
            f"`remap_to` has a target for {unknown[0]!r}, which is not forgotten; forgotten are "
            f"{', '.join(map(repr, names))}. Spell it as there, or take it out."
        )
    if missing := [name for name in names if name not in targets]:
        raise PrototypeError(
            f"`remap_to` has no target for {', '.join(map(repr, missing))}. Give every forgotten name its "
            "targets, or `None` to project it out without remapping."
        )
    return {name: targets[name] for name in names}


def _read_reach(value: Any, concepts: Iterable[str]) -> str | dict[str, str]:
    """One reach for all concepts, or a mapping from some of them; the others have the default."""
    if not isinstance(value, Mapping):
        check_choice("reach", value, REACHES)
        return value
    for name, reach in value.items():
        check_choice("reach", reach, REACHES)
        if name not in concepts:
            raise PrototypeError(
                f"`reach` is given for {shown(name)}, which is not forgotten. Use the spelling in `concepts`."
            )
    return dict(value)


def _farther(earlier: str | Mapping[str, str], later: str | Mapping[str, str]) -> str | dict[str, str]:
    """What was edited stays edited, by the later way."""
    ways: list[str] = []
    for own in (later, earlier):
        ways += [own] if isinstance(own, str) else own.values()
    way = next((reach for reach in ways if reach != "name"), "name")
    if any(isinstance(own, str) and own != "name" for own in (earlier, later)):
        return way
    joined: dict[str, str] = {}
    for own in (earlier, later):
        if not isinstance(own, str):  # "name" edits nothing inside, so it adds nothing
            for name, reach in own.items():
                joined[name] = "name" if {reach, joined.get(name, "name")} == {"name"} else way
    return joined or "name"


def _check_strength(request: ConceptRequest) -> None:
    """Raises `PrototypeError` for a strength out of range, or one that a router cannot have."""
    if not 0 < request.strength <= STRONGEST:
        raise PrototypeError(
            f"`strength` must be above 0, which would change nothing, and at most {STRONGEST}, got "
            f"{request.strength}."
        )
    # By G3, an expert is exact on top of the mean expert in the weights; a scaled edit has no G3.
    if request.router is not None and request.strength != 1:
        raise PrototypeError(
            f"A router needs the whole edit, and `strength={request.strength:g}` scales it. Leave out "
            "`strength`, or the router."
        )


def _read_some(argument: str, value: Any) -> tuple[str, ...]:
    """At least one name, or no name for `None`."""
    names = read_names(argument, value)
    if value is not None and not names:
        raise PrototypeError(
            f"`{argument}` is empty. Name at least one concept to send the others to, "
            f"or pass `{argument}=None` to project them out without remapping."
        )
    return names


def is_remain(targets: Any) -> bool:
    """Whether `targets` stands for every class that is not forgotten."""
    return isinstance(targets, str) and targets == REMAIN


def names_in(text: str, name: str) -> bool:
    """Whether `text` contains `name` as whole words, in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text.casefold()) is not None


def _check_names(request: ConceptRequest) -> None:
    """Raises `PrototypeError` if a name is blank, given twice, or both forgotten and kept."""
    surfaces = request.surfaces
    kept = {name: "remap_to" for name in request.targets}
    kept |= {name: "retain" for name in request.retain if name not in kept}
    if blank := [name for name in (*surfaces, *kept) if not name.strip()]:
        raise PrototypeError(
            f"{blank[0]!r} is not a name. Leave it out; the empty prompt is always retained."
        )
    # in upper or lower case, a name is the same concept
    folded = [surface.casefold() for surface in surfaces]
    if twice := [surface for surface in surfaces if folded.count(surface.casefold()) > 1]:
        raise PrototypeError(f"{twice[0]!r} is given twice among concepts and aliases. Name it once.")
    for name, surface in product(kept, surfaces):
        argument = kept[name]
        if name.casefold() == surface.casefold():
            raise PrototypeError(
                f"{name!r} is both erased and in `{argument}`. Remove it from one of the lists."
            )
        # "Van Gogh's sunflowers" cannot be kept while "Van Gogh" is erased: they share the features.
        if names_in(name, surface):
            raise PrototypeError(
                f"{name!r} in `{argument}` contains {surface!r}, which is erased: keeping one keeps the "
                f"other. If it is its alias, concepts={{{surface!r}: [{name!r}]}}, take it out there."
            )


def _check_given(request: ConceptRequest) -> None:
    """Raises `PrototypeError` for pictures that nothing reads, or options that need a name without one."""
    if unread := [name for name in request.given if name not in request.inside]:
        raise PrototypeError(
            f"{unread[0]!r} is given by pictures, which only the layers inside the denoiser read. Pass "
            "reach='denoiser', or name it in `concepts` without pictures."
        )
    for name in request.given.keys() - request.named.keys():
        if request.concepts[name]:
            raise PrototypeError(f"{name!r} has aliases, but no name. Pass `Pictures(folder, name=...)`.")
    if request.router is not None and not request.named:
        raise PrototypeError(
            f"A router acts on the prompt, where {', '.join(map(repr, request.given))} has no name. Leave "
            "`router` out, or pass `Pictures(folder, name=...)`."
        )


def _check_gates(request: ConceptRequest) -> None:
    """Raises `PrototypeError` for what gates cannot be made from."""
    if not request.gated:
        return
    if {request.reach_of(name) for name in request.inside} != {"gates"}:
        raise PrototypeError(
            f"`reach` is {request.reach!r}, and layers inside the denoiser are edited by one way alone. Give "
            "'gates' or 'denoiser' to all concepts that need either."
        )
    if nameless := request.given.keys() - request.named.keys():
        raise PrototypeError(
            f"{sorted(nameless)[0]!r} is given by pictures without a name, and gates go beside an edit of "
            "one. Pass `Pictures(folder, name=...)`, or reach='denoiser'."
        )
    if not request.softness > 0:
        raise PrototypeError(
            "`softness` divides what gates write, so it must be above 0. Pass 0.5 to forget more."
        )
    if request.pictures < FEWEST_FOR_GATES:
        raise PrototypeError(
            f"Gates need at least {FEWEST_FOR_GATES} pictures of each name, of which some are held out, got "
            f"{request.pictures}. Raise `pictures`."
        )


def _read_sampling(value: Any) -> dict[str, int | float | bool | str]:
    """Arguments of a pipeline's call. Raises `PrototypeError` for any that a record could not hold."""
    if not isinstance(value, Mapping):
        raise PrototypeError(
            f"`sampling` must be a mapping of arguments of the pipeline's call, got {shown(value)}."
        )
    for name, setting in value.items():
        if not isinstance(name, str) or not isinstance(setting, int | float | bool | str):
            raise PrototypeError(
                f"`sampling` takes numbers and texts by name, such as num_inference_steps=20, got "
                f"{shown(name)}: {shown(setting)}."
            )
        if name in DRAWN_WITH:
            raise PrototypeError(f"`sampling` cannot set {name!r}: the edit sets it. Leave it out.")
    return dict(value)


def check_choice(argument: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Raises `PrototypeError` unless the value is one of the choices."""
    if value not in choices:
        raise PrototypeError(
            f"Unknown {argument} {shown(value)}. Choose one of {', '.join(map(repr, choices))}."
        )


def check_number(argument: str, value: float) -> None:
    """Raises `PrototypeError` unless the value is finite and at least 0."""
    if not 0 <= value < math.inf:
        raise PrototypeError(f"`{argument}` must be a finite number of at least 0, got {value}.")


def read_count(argument: str, value: SupportsIndex) -> int:
    """A whole number as an `int`. Raises `PrototypeError` if it is less than 1."""
    if index(value) < 1:
        raise PrototypeError(f"`{argument}` must be at least 1, got {value}.")
    return index(value)


def read_seeds(value: Iterable[SupportsIndex]) -> list[int]:
    """One seed for each image, from a sequence, tensor or array. Raises `PrototypeError` for none."""
    seeds = [index(seed) for seed in value]
    if not seeds:
        raise PrototypeError("`seeds` is empty. Pass one whole number per image of the batch.")
    return seeds


def read_names(argument: str, value: Any) -> tuple[str, ...]:
    """One name, several, or `None` for none, as a tuple. Raises `PrototypeError` for what is no text."""
    if value is None:
        return ()
    several = isinstance(value, Iterable) and not isinstance(value, str)
    names = tuple(value) if several else (value,)
    for name in names:
        if not isinstance(name, str):
            raise PrototypeError(
                f"`{argument}` must be a name or a list of names, got {shown(name)} among them."
            )
    return names


def read_mapping(argument: str, value: Any, read: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A mapping from names, with values by `read(argument, value)`. Raises `PrototypeError` for any other."""
    if not isinstance(value, Mapping):
        raise PrototypeError(f"`{argument}` must be a mapping from names, got {type(value).__name__}.")
    names = read_names(argument, list(value))
    return {name: read(argument, value[name]) for name in names}
