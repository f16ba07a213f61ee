"""Check a saved folder against its record, from the files alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers.configuration_utils import ConfigMixin
from safetensors import safe_open
from torch import Tensor, nn

from ..core.claims import check_of
from ..core.errors import ExportError, IncompatibleBaseError, MoreError, SiteNotFoundError
from ..core.facts import READERS, ConceptFacts, is_text
from ..core.markdown import markdown_table
from ..core.proof import SLACK
from ..core.record import Record
from ..core.remap import Removed
from ..core.request import ConceptRequest
from ..core.site import Site, fingerprint, is_linear, matrix_of
from ..diffusion.encoder import Encoder
from ..diffusion.families import denoiser_names
from ..diffusion.plan import prepare, solve, token_choices
from ..diffusion.proof import prove_no_other_way, prove_weights
from ..diffusion.sites import Denoiser, as_one_denoiser, find_layers
from .contents import DELTA, INDEX, changed_files, survey, variant_of, weight_files
from .delta import read_delta
from .files import reading
from .layers import pipeline_class, read_denoiser, read_index, read_tensors


# How much of ‖W (p_f − p̄_t)‖ may be left, relative to a weight that does not know the direction. Rounding of
# weights and prototypes leaves 1e-7 (float32), 6e-4 (float16) and 7e-3 (bfloat16); an original layer has 0.5
# to 2.
TOLERANCE = 0.05
MOST = 2  # that is left of a direction in an original layer
# A soft edit is checked in the directions of which it leaves at most this share.
SOFT_SHARE = TOLERANCE / 2
# A soft or scaled edit that leaves more than this of every direction looks like the original: never passes.
SOFTEST = 0.5


class Check(NamedTuple):
    """One check of a folder: what must hold, whether it does, and the finding."""

    name: str
    passed: bool
    finding: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; true if every check passed."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> str:
        """The failed checks with their findings, for an error message."""
        return "; ".join(f"{check.name}: no ({check.finding})" for check in self.checks if not check.passed)

    def to_markdown(self) -> str:
        """A table with one line per check."""
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
    An edited layer that a folder should hold: its name, the space that it reads, and the shape of its edited
    part.
    """

    name: str
    space: str
    shape: list[int]


@dataclass(frozen=True)
class StoredWeights:
    """The content of a component's weight files."""

    shapes: dict[str, list[int]]  # the shape of every tensor
    edited: dict[str, Tensor]  # the edited part of each layer that the record names, if the files have it


def verify(
    folder: str | os.PathLike,
    *,
    run: bool = False,
    rerun: bool = False,
    base: str | os.PathLike | None = None,
) -> Verification:
    """
    Check a saved folder against its record, from the files alone: are these weights the edited ones?

    Every file must be as `save` wrote it, and no other file may be one that could load as weights. Whatever
    the record says, names and shapes must be the base's, the prototypes are computed again with the folder's
    text encoder, and every layer that reads text must send each forgotten prototype where its target goes.
    Layers inside the denoiser (`reach="denoiser"`) are checked by their fingerprint alone, since only the
    original can show what they read from the concept's pictures. A classifier's prototypes cannot be computed
    again, only read from the factors of `include_delta=True`. The check runs no code from the folder and
    opens no pickle.

    Args:
        folder (`str` or `os.PathLike`):
            A folder that `save` wrote, or a downloaded one.
        run (`bool`, *optional*, defaults to `False`):
            Of a pipeline, also load the denoiser and run it: with the installed version of diffusers, no
            other layer than the edited ones may read the prompt, and each must compute with its stored
            weight.
        rerun (`bool`, *optional*, defaults to `False`):
            Of a pipeline, also erase again from the original, as the record says, and compare every tensor:
            the finding says whether they are the same bit for bit, by how much they are apart, and in what
            versions and device the two runs differ. Passes where each edited layer is the same to a tenth of
            its edit and the rest to rounding. Needs the time of an erasure, and room for another copy.
        base (`str` or `os.PathLike`, *optional*):
            The original's folder or name on the Hub for `rerun`; by default where the record says.

    Returns:
        [`Verification`]: true if every check passed; `print` shows the checks and their findings.

    Raises:
        `MoreError`: the folder has no record, or `rerun` has no original. `IncompatibleBaseError`: the record
        is malformed, or the original cannot be read.

    Example:

    ```py
    >>> import more_hf

    >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
    >>> assert more_hf.verify(more_hf.save(pipe, "without-blobmoji"))
    ```
    """
    folder = Path(folder)
    record = Record.read(folder)
    layers = [Layer(name, name, shape) for name, shape in record.sites.items()]
    try:
        if record.kind == "classifier":
            removed = {space: Removed(remap.shift(), 0.0) for space, remap in read_delta(folder).items()}
        else:
            denoiser = _read_denoisers(folder, record)
            layers = _layers_of(denoiser, record)
            removed = _removed_by(folder, record, denoiser)
    except MoreError as error:
        removed = error  # reported among the other checks
    changed = changed_files(folder, record.files)
    finding = ", ".join(changed) or f"{len(record.files)} files"
    unchanged = Check("every file is the one that was saved", not changed, finding)
    checks = [unchanged, *check_folder(folder, record, layers, removed).checks]
    # a run shows what reads the prompt: nothing that is edited, where nothing has a name
    if run and record.kind == "pipeline" and removed and not isinstance(removed, MoreError):
        checks.append(_run(folder, record, denoiser, removed))
    if rerun:
        from .rerun import erased_again  # which saves, and saving checks

        checks += erased_again(folder, record, None if base is None else os.fspath(base))
    return Verification(tuple(checks))


def check_folder(
    folder: Path, record: Record, layers: Iterable[Layer], removed: Mapping[str, Removed] | MoreError
) -> Verification:
    """
    Check a folder's weights against its record and every layer that must be edited. `removed` are the
    directions that the edit removes from each space; empty if they cannot be known, or the error that
    prevented computing them.
    """
    foreign = ", ".join(map(str, survey(folder, record).foreign))
    alone = Check("no other weights are in the folder", not foreign, foreign or "none")
    try:
        stored = read_weights(folder, record)
    except IncompatibleBaseError as error:
        return Verification((Check("the weights can be read", False, str(error)), alone))
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
    pipeline = record.kind == "pipeline"
    if pipeline:
        name = check_of(record.facts, record.request.remap_to.values(), record.request.strength)
    else:
        name = check_of(record.facts, record.facts.sent_to.values())
    inside = [layer for layer in layers if pipeline and not is_text(layer.space)]
    if isinstance(removed, MoreError):
        checks.append(Check(name, False, str(removed)))
    elif removed:
        recomputed = [layer for layer in layers if layer not in inside]
        checks.append(remapped(name, stored.edited, recomputed, removed))
    if inside:  # only the original can show what they read (see `verify`)
        found = f"{len(inside)} of {len(expected)} layers, by the fingerprint alone"
        checks.append(Check("those inside the denoiser are the saved ones", saved_as == record.edited, found))
    return Verification((*checks, alone))


def checked_before_upload(record: Record) -> str:
    """What `verify` compares the edited layers of this record's files with, as a sentence for the card."""
    inside = [space for space in record.facts.spaces.values() if not is_text(space)]
    if record.kind == "classifier":
        inside = [] if DELTA in record.files else list(record.sites)
    parts = []
    if len(inside) < len(record.sites):
        again = len(record.sites) - len(inside)
        parts.append(f"{again} edited layer(s) against prototypes that were fitted again, or their factors")
    if inside:
        parts.append(f"{len(inside)} against the fingerprint of what was saved alone")
    return f"These files were checked before they were uploaded: {', and '.join(parts)}."


def read_weights(folder: Path, record: Record) -> StoredWeights:
    """
    Read the edited component's files.

    Raises:
        `IncompatibleBaseError`: a file cannot be read, or two have the same tensor.
    """
    stored, biases = StoredWeights({}, {}), {}
    for component, prefix in record.prefixes.items():
        for path in weight_files(record, component):
            with reading(folder / path), safe_open(folder / path, "pt") as file:
                for key in file.keys():
                    if prefix + key in stored.shapes:
                        raise IncompatibleBaseError(
                            f"{folder / component} has `{key}` twice, and the library decides which is read. "
                            "Save the erased model again."
                        )
                    stored.shapes[prefix + key] = list(file.get_slice(key).get_shape())
                    layer = (prefix + key).removesuffix(".weight")
                    if key.endswith(".weight") and layer in record.sites:
                        # Columns after the edited ones do not read text.
                        width = record.sites[layer][1]
                        stored.edited[layer] = matrix_of(file.get_tensor(key))[..., :width]
                    layer = (prefix + key).removesuffix(".bias")
                    if key.endswith(".bias") and record.facts.spaces.get(layer) == READERS:
                        biases[layer] = file.get_tensor(key)
    for layer in stored.edited.keys() & biases.keys():
        stored.edited[layer] = torch.cat([stored.edited[layer], biases[layer][:, None]], dim=1)
    return stored


def require_saved_weights(folder: Path, record: Record) -> None:
    """
    Raises `IncompatibleBaseError` if the edited layers in the files are not those of the record, or if the
    library may have read other files.
    """
    foreign = [path for path in survey(folder, record).foreign if str(path.parent) in record.prefixes]
    others = [path for path in foreign if variant_of(path.name) == (record.variant or "")]
    indices = {}
    for path in map(Path, record.files):
        if str(path.parent) in record.prefixes and INDEX.fullmatch(path.name):
            indices[path.as_posix()] = record.files[path.as_posix()]
    if others := others + changed_files(folder, indices):
        raise IncompatibleBaseError(
            f"{folder} has {', '.join(map(str, others))}, which `save` did not write and which may have been "
            "loaded. Remove it, or save the erased model again."
        )
    actual = fingerprint(read_weights(folder, record).edited)
    if actual != record.edited:
        raise IncompatibleBaseError(
            f"The edited layers of `{record.denoiser}` in {folder} have the fingerprint {actual}, but the "
            f"record was written for {record.edited}: the weights were replaced or trained since. Erase from "
            "the original model again, or use `from_pretrained`, which reads no record."
        )


def left_over(weight: Tensor, removed: Removed) -> float:
    """
    ‖W x‖ over the removed directions x, relative to the average for a weight of this norm; NaN for a weight
    of zeros.
    """
    weight, directions = weight.detach().cpu().double(), removed.directions.double()
    size = weight.norm() * directions.norm() / weight.shape[1] ** 0.5
    return float((weight @ directions).norm() / size)


def most_left(removed: Removed) -> float:
    """The limit for `left_over`: the share that the edit leaves of what the original has, and rounding."""
    return TOLERANCE + MOST * removed.share if removed.share <= SOFTEST else 0.0


def remapped(
    name: str, edited: Mapping[str, Tensor], layers: Iterable[Layer], removed: Mapping[str, Removed]
) -> Check:
    """Whether no layer reads the removed directions any more; the finding names the worst layer."""
    measured = []
    for layer in layers:
        weight, gone = edited.get(layer.name), removed.get(layer.space)
        if weight is None or gone is None or weight.shape[1:] != gone.directions.shape[:1]:
            return Check(name, False, f"`{layer.name}` is missing or has another width")
        left, most = left_over(weight, gone), most_left(gone)
        # the comparison is false for a NaN
        measured.append((left < most, -left, f"`{layer.name}`: {left:.1e} is left (limit {most:.2g})"))
    passed, _, finding = min(measured)
    return Check(name, passed, finding)


def refuse_weak(request: ConceptRequest) -> None:
    """Raises `ExportError` for an edit so weak that no check can tell it from the original."""
    if abs(1 - request.strength) > SOFTEST:
        raise ExportError(
            f"At strength {request.strength:g} more than half of what was erased is left, and the weights "
            "cannot be told from the original's. Write such an edit with `more_hf.save_lora`, or erase with "
            f"a strength of at least {1 - SOFTEST:g}."
        )


def removed_from(encoder: Encoder, request: ConceptRequest, facts: ConceptFacts) -> dict[str, Removed]:
    """
    Space -> the directions that the edit removes, computed with the pipeline's text encoders.

    Raises:
        `ExportError`: as from `refuse_weak`.
    """
    refuse_weak(request)
    if facts.solver == "soft":
        remaps = solve(encoder, request).remaps
        return {space: remap.removed(SOFT_SHARE) for space, remap in remaps.items()}
    # What an exact edit removes does not depend on the solver or on retained names.
    tokens = facts.tokens or request.tokens
    if tokens not in token_choices(request):
        raise IncompatibleBaseError(
            f"The record says that {tokens!r} made the prototypes, which its request does not allow. "
            "Save the erased model again."
        )
    problems = prepare(encoder, replace(request, retain=()), metric=False)
    return {space: problem.fit("pinv", tokens).removed() for space, problem in problems.items()}


def _run(folder: Path, record: Record, denoiser: Denoiser, removed: Mapping[str, Removed]) -> Check:
    """The proof by run of a folder's denoiser, which is on the meta device, with its weights loaded."""
    stored = read_weights(folder, record).edited
    dtype = next(iter(stored.values())).dtype
    parts = []
    for component, part in denoiser.parts.items():
        module = type(part).from_pretrained(
            folder / component, variant=record.variant, torch_dtype=dtype, use_safetensors=True
        )
        parts.append(Denoiser(component, module, denoiser.family))
    loaded = as_one_denoiser(parts, record.facts.pipeline)
    sites = {
        name: Site(name, reader.module, space=reader.space, columns=reader.columns)
        for name, reader in find_layers(loaded, pooled=record.request.pooled).items()
    }
    directions = {space: gone.directions for space, gone in removed.items()}
    name = "run, nothing else reads the prompt"
    try:
        prove_no_other_way(loaded, directions)
        rows = {space: examples.T for space, examples in directions.items()}
        measured = prove_weights(loaded, sites, rows, stored)
    except SiteNotFoundError as error:
        return Check(name, False, str(error))
    error = measured["layer_error"]
    return Check(name, True, f"each layer computes with its weight, to {error:.1f} roundings (limit {SLACK})")


def _read_denoisers(folder: Path, record: Record) -> Denoiser:
    """
    The record's denoisers, on the meta device.

    Raises:
        `IncompatibleBaseError`: the folder has a denoiser that the record does not mention.
    """
    denoisers = []
    for component in record.prefixes:
        files = [folder / path for path in weight_files(record, component)]
        denoisers.append(read_denoiser(folder, component, partial(read_tensors, files), layers=False))
    names = denoiser_names(*read_index(folder))
    if others := set(names).difference(record.prefixes):
        raise IncompatibleBaseError(
            f"{folder} also has the denoiser `{others.pop()}`, which the record, of `{record.denoiser}`, "
            "does not mention: it may be the original. Erase from the whole pipeline, and save that."
        )
    return as_one_denoiser(denoisers, record.facts.pipeline)


def _removed_by(folder: Path, record: Record, denoiser: Denoiser) -> dict[str, Removed]:
    with reading(folder):
        cls, parts = read_index(folder)
        unused = {name: None for name in ("vae", "safety_checker") if name in parts}
        # Some pipelines look at their denoiser on creation.
        unused |= denoiser.parts
        pipe = pipeline_class(cls).from_pretrained(
            folder, variant=record.variant, use_safetensors=True, **unused
        )
        pipe.register_modules(**dict.fromkeys(denoiser.parts))
        encoder = Encoder.of(pipe, record.request, denoiser)
        return removed_from(encoder, record.request, record.facts)


def _layers_of(denoiser: Denoiser, record: Record) -> list[Layer]:
    """Every layer of the denoiser that reads text, and those inside it that the record names."""
    layers = []
    inner = {name: space for name, space in record.facts.spaces.items() if not is_text(space)}
    modules = dict(denoiser.module.named_modules())
    for name, space in inner.items():
        if not is_linear(modules.get(name)):
            raise IncompatibleBaseError(
                f"The record names an edited layer `{name}`, which is not a linear layer of this model. Save "
                "the erased model again."
            )
        rows, width = matrix_of(modules[name].weight).shape
        layers.append(Layer(name, space, [rows, width + (space == READERS)]))
    readers = find_layers(denoiser, pooled=record.request.pooled) if record.request.named else {}
    for name, reader in readers.items():
        rows, width = reader.module.weight.shape
        columns = width if reader.columns is None else reader.columns
        layers.append(Layer(name, reader.space, [rows, columns]))
    return layers


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of every tensor that would be saved."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def expected_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of every tensor that a fresh model of the same class and configuration has."""
    build = type(module).from_config if isinstance(module, ConfigMixin) else type(module)
    try:
        with init_empty_weights():
            return shapes_of(build(module.config))
    except RuntimeError:  # some models of timm compute with their weights while they are built
        with torch.random.fork_rng(devices=[]):
            return shapes_of(build(module.config))


def layout_of(shapes: Mapping[str, list[int]]) -> str:
    """The sha256 of names and shapes."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()
