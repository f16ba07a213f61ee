"""Check a saved folder against its record, from the files alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from safetensors import safe_open
from torch import Tensor, nn

from ..core.errors import IncompatibleBaseError, MoreError
from ..core.facts import TEXT_SPACES, ConceptFacts
from ..core.markdown import markdown_table
from ..core.record import Record
from ..core.remap import Removed
from ..core.request import ConceptRequest
from ..core.site import fingerprint, matrix_of
from ..diffusion.families import denoiser_names
from ..diffusion.plan import prepare, solve, token_choices
from ..diffusion.sites import Denoiser, find_layers, together
from .contents import Contents, survey
from .delta import read_delta
from .files import path_of, reading
from .layers import pipeline_class, read_denoiser


# How much of ‖W (p_f − p̄_t)‖ may be left, where a weight that does not know the direction gives 1. Rounding
# of weights and prototypes leaves 1e-7 (float32), 6e-4 (float16) and 7e-3 (bfloat16); an original layer has
# 0.5 to 2.
TOLERANCE = 0.05
# Of a soft edit the directions of which it leaves at most this share are looked at.
SOFT_SHARE = TOLERANCE / 2
# One that leaves more than this of every direction cannot be told from the original, and never passes.
SOFTEST = 0.5


class Check(NamedTuple):
    """One check of a folder: what must hold, whether it does, and what was found."""

    name: str
    passed: bool
    finding: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found; true if every check passed."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> str:
        """The checks that failed and what they found, for an error."""
        return "; ".join(f"{check.name}: no ({check.finding})" for check in self.checks if not check.passed)

    def to_markdown(self) -> str:
        """A table, one check a line."""
        rows = [
            {"check": check.name, "holds": "yes" if check.passed else "NO", "finding": check.finding}
            for check in self.checks
        ]
        return markdown_table(rows)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


class Layer(NamedTuple):
    """
    What a folder should hold of an edited layer: its name, the space that it reads, and the shape of that
    part.
    """

    name: str
    space: str
    shape: list[int]


@dataclass(frozen=True)
class StoredWeights:
    """
    What was read from a component's files.

    Args:
        shapes (`dict[str, list[int]]`):
            Of every tensor.
        edited (`dict[str, Tensor]`):
            The edited part of each layer that the record names, as far as it is there.
    """

    shapes: dict[str, list[int]]
    edited: dict[str, Tensor]


def verify(folder: str | os.PathLike) -> Verification:
    """
    Check a saved folder against its record, from the files alone: are these weights the edited ones?

    The edited layers must have the fingerprint that they were saved with. Besides, the prototypes are
    computed again with the folder's text encoder, and every layer that reads text must send each forgotten
    one where its target goes. Layers inside the denoiser (`reach="denoiser"`) have their fingerprint alone,
    since what they read of the concept's pictures only the original tells. A classifier's prototypes cannot
    be computed again, only be read from the factors of `include_delta=True`. Names and shapes must be the
    base's, and nothing else may be in the folder but texts, pictures and git's files. No code of the folder
    runs, and no pickle is opened.

    Args:
        folder (`str` or `os.PathLike`):
            A folder that `save` wrote, or that was downloaded.

    Returns:
        [`Verification`]: true if every check passed; `print` shows the checks and what was found.

    Raises:
        `MoreError`: the folder has no record. `IncompatibleBaseError`: the record or an index is none that
        `save` writes.

    Example:

    ```py
    >>> import more_hf

    >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
    >>> assert more_hf.verify(more_hf.save(pipe, "without-blobmoji"))
    ```
    """
    folder = path_of("folder", folder)
    record = Record.read(folder)
    contents = survey(folder, record)
    layers = [Layer(name, name, shape) for name, shape in record.sites.items()]
    try:
        if record.kind == "classifier":
            removed = {space: Removed(remap.shift(), 0.0) for space, remap in read_delta(folder).items()}
        else:
            denoiser = _read_denoisers(folder, record, contents)
            layers = _layers_of(denoiser, record)
            removed = _removed_by(folder, record, denoiser)
    except MoreError as error:
        removed = error  # the other checks still say what is there
    return check_folder(folder, record, contents, layers, removed)


def check_folder(
    folder: Path,
    record: Record,
    contents: Contents,
    layers: Iterable[Layer],
    removed: Mapping[str, Removed] | MoreError,
) -> Verification:
    """
    Check a folder's files.

    Args:
        folder (`Path`):
            The folder.
        record (`Record`):
            Its record.
        contents (`Contents`):
            What it holds.
        layers (`Iterable[Layer]`):
            Every layer that must be edited.
        removed (`Mapping[str, Removed]` or `MoreError`):
            What the edit removes from each space; empty if it cannot be known, or the reason why it could not
            be computed.
    """
    try:
        stored = read_weights(folder, record, contents)
    except IncompatibleBaseError as error:
        return Verification((Check("the weights can be read", False, str(error)),))
    expected = {layer.name: layer.shape for layer in layers}
    found = {name: list(weight.shape) for name, weight in stored.edited.items()}
    saved_as = fingerprint(stored.edited)
    checks = [
        Check(
            "names and shapes are the base's",
            layout_of(stored.shapes) == record.layout,
            f"{len(stored.shapes)} tensors",
        ),
        Check(
            "every edited layer is there",
            found == expected == record.sites,
            f"{len(found)} of {len(expected)}",
        ),
        Check(
            "the edited layers are those that were saved",
            saved_as == record.edited,
            f"sha256 {saved_as[:12]}",
        ),
    ]
    if isinstance(removed, MoreError):
        checks.append(Check("each sends p_f where p_t goes", False, str(removed)))
    elif removed:
        # What layers inside the denoiser read of pictures only the original tells: their fingerprint vouches.
        inside = record.kind == "pipeline" and record.request.reach == "denoiser"
        reading = [layer for layer in layers if not inside or layer.space in TEXT_SPACES]
        checks.append(_remapped(stored.edited, reading, removed))
    foreign = ", ".join(map(str, contents.foreign))
    checks.append(Check("nothing else is in the folder", not foreign, foreign or "none"))
    return Verification(tuple(checks))


def read_weights(folder: Path, record: Record, contents: Contents) -> StoredWeights:
    """
    Read the edited component's files.

    Raises:
        `IncompatibleBaseError`: a file cannot be read.
    """
    shapes, edited = {}, {}
    for component, prefix in record.prefixes.items():
        for path in contents.weights[component]:
            with reading(folder / path), safe_open(folder / path, "pt") as file:
                stored = {prefix + name: name for name in file.keys()}
                shapes |= {name: list(file.get_slice(own).get_shape()) for name, own in stored.items()}
                for name in [name for name in record.sites if f"{name}.weight" in stored]:
                    # Columns after the edited ones read something else than text.
                    weight = matrix_of(file.get_tensor(stored[f"{name}.weight"]))
                    edited[name] = weight[..., : record.sites[name][1]]
    return StoredWeights(shapes, edited)


def require_saved_weights(folder: Path, record: Record) -> None:
    """
    Raises `IncompatibleBaseError` if the edited layers in the files are not those that the record was written
    for.
    """
    found = fingerprint(read_weights(folder, record, survey(folder, record)).edited)
    if found != record.edited:
        raise IncompatibleBaseError(
            f"The edited layers of `{record.denoiser}` in {folder} have the fingerprint {found}, but the "
            f"record was written for {record.edited}: the weights were replaced or trained since. Erase from "
            "the original model again, or use `from_pretrained`, which reads no record."
        )


def left_over(weight: Tensor, removed: Removed) -> float:
    """
    ‖W x‖ over what was removed, as a share of what a weight of this size gives on average; NaN for a weight
    of zeros.
    """
    weight, directions = weight.detach().cpu().double(), removed.directions.double()
    size = weight.norm() * directions.norm() / weight.shape[1] ** 0.5
    return float((weight @ directions).norm() / size)


def most_left(removed: Removed) -> float:
    """
    How much may be left by `left_over`: of a soft edit that removes no direction nearly whole, the geometric
    mean of what it leaves and what the original has.
    """
    if removed.share > SOFTEST:
        return 0.0
    return TOLERANCE if removed.share <= SOFT_SHARE else removed.share**0.5


def _remapped(edited: Mapping[str, Tensor], layers: Iterable[Layer], removed: Mapping[str, Removed]) -> Check:
    """Whether every layer sends p_f where p_t goes, with the first that does not, or the worst."""
    name, measured = "each sends p_f where p_t goes", []
    for layer in layers:
        weight, gone = edited.get(layer.name), removed.get(layer.space)
        if weight is None or gone is None or weight.shape[1:] != gone.directions.shape[:1]:
            return Check(name, False, f"`{layer.name}` is missing or has another width")
        left, most = left_over(weight, gone), most_left(gone)
        # written so that a NaN fails
        measured.append((left < most, -left, f"`{layer.name}`: {left:.1e} is left (limit {most:.2g})"))
    passed, _, finding = min(measured)
    return Check(name, passed, finding)


def removed_from(
    pipe: DiffusionPipeline, request: ConceptRequest, facts: ConceptFacts, denoiser: Denoiser | None = None
) -> dict[str, Removed]:
    """
    Space -> what the edit removes, by the pipeline's text encoders, and its denoiser unless it was loaded
    without.
    """
    if facts.solver == "soft":
        remaps = solve(pipe, request, denoiser).remaps
        return {space: remap.removed(SOFT_SHARE) for space, remap in remaps.items()}
    # The solver and retained names do not matter to an exact edit.
    tokens = facts.tokens or request.tokens
    if tokens not in token_choices(request):
        raise IncompatibleBaseError(
            f"The record says that {tokens!r} made the prototypes, which is none of what its request leads "
            "to. Save the erased model again."
        )
    problems = prepare(pipe, replace(request, retain=()), denoiser, metric=False)
    return {space: problem.fit("pinv", tokens).removed() for space, problem in problems.items()}


def _read_denoisers(folder: Path, record: Record, contents: Contents) -> Denoiser:
    """
    What the record is about, on the meta device.

    Raises:
        `IncompatibleBaseError`: the folder has a denoiser that it is not about.
    """
    denoisers = []
    for component in record.prefixes:
        files = [folder / path for path in contents.weights[component]]
        denoisers.append(read_denoiser(folder, component, files, layers=False))
    with reading(folder):
        config = DiffusionPipeline.load_config(folder)
        parts = {name: value[1] for name, value in config.items() if isinstance(value, list) and value[1]}
        names = denoiser_names(config["_class_name"], parts)
    if others := set(names).difference(record.prefixes):
        raise IncompatibleBaseError(
            f"{folder} also has the denoiser `{others.pop()}`, of which the record, of `{record.denoiser}`, "
            "says nothing: it may be the original. Erase from the whole pipeline, and save that."
        )
    return together(denoisers, record.facts.pipeline)


def _removed_by(folder: Path, record: Record, denoiser: Denoiser) -> dict[str, Removed]:
    with reading(folder):
        parts = DiffusionPipeline.load_config(folder)
        unused = {name: None for name in ("vae", "safety_checker") if name in parts}
        # some pipelines look at their denoiser when they are made
        unused |= denoiser.parts
        pipe = pipeline_class(parts["_class_name"]).from_pretrained(
            folder, variant=record.variant, use_safetensors=True, **unused
        )
        pipe.register_modules(**dict.fromkeys(denoiser.parts))
        return removed_from(pipe, record.request, record.facts, denoiser)


def _layers_of(denoiser: Denoiser, record: Record) -> list[Layer]:
    """Every layer of the denoiser that reads text, and those inside it that the record names."""
    layers = []
    inner = {name: space for name, space in record.facts.spaces.items() if space not in TEXT_SPACES}
    modules = dict(denoiser.module.named_modules())
    for name, space in inner.items():
        if not isinstance(modules.get(name), nn.Linear):
            raise IncompatibleBaseError(
                f"The record names an edited layer `{name}`, which is no linear layer of this model. Save "
                "the erased model again."
            )
        layers.append(Layer(name, space, list(modules[name].weight.shape)))
    for name, reader in find_layers(denoiser, pooled=record.request.pooled).items():
        rows, columns = reader.module.weight.shape
        layers.append(
            Layer(name, reader.space, [rows, columns if reader.columns is None else reader.columns])
        )
    return layers


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of every tensor that would be saved."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def expected_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of every tensor that a fresh model of the same class and configuration has."""
    with init_empty_weights():
        if isinstance(module, ConfigMixin):
            return shapes_of(type(module).from_config(module.config))
        return shapes_of(type(module)(module.config))


def layout_of(shapes: Mapping[str, list[int]]) -> str:
    """The sha256 of names and shapes."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()
