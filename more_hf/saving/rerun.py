"""Erase again from the original what a record says, and compare the result with the saved folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from ..core.errors import MoreError
from ..core.record import Record
from ..diffusion.erase import erase, get_erasure
from .card import HUB_ID
from .check import Check, read_weights
from .contents import WEIGHTS, changed_files, folder_of_base
from .files import reading
from .folder import save
from .layers import pipeline_class


SAME = 0.1  # an edited layer may be off by this share of its edit; the original's layer is off by 1


def erased_again(folder: Path, record: Record, base: str | None) -> list[Check]:
    """
    The further checks of `verify(folder, rerun=True)`.

    Raises:
        `MoreError`: the folder holds a classifier, or the original is not here. `IncompatibleBaseError`: the
        original cannot be read. Also whatever `erase_concept` raises.
    """
    if record.kind == "classifier":
        raise MoreError(
            f"{folder} holds a classifier, whose prototypes come from samples of somebody's data. Load the "
            "original, and call `more_hf.erase_classes` with them."
        )
    source = folder_of_base(base or record.facts.base)
    if not source.is_dir() and not HUB_ID.fullmatch(str(source)):
        raise MoreError(
            f"{folder} was erased from {record.facts.base or 'a model without a name'}, and there is no such "
            "folder here. Pass `base=` (`--base`), the original's folder or its name on the Hub."
        )
    # 1. Open the original in the precision and on the kind of device of the first time.
    pipe = _original(source, record, read_weights(folder, record).edited)
    # 2. Erase and save.
    erase(pipe, record.request)
    erasure = get_erasure(pipe)
    # 3. Compare what was read, and what was written.
    changed = changed_files(source, record.sources) if source.is_dir() else []
    fingerprints = [facts.fingerprint[:12] for facts in (record.facts, erasure.facts)]
    finding = f"edited layers: sha256 {' and now '.join(dict.fromkeys(fingerprints))}"
    finding += f"; not as they were: {', '.join(changed)}" if changed else ""
    same = erasure.facts.fingerprint == record.facts.fingerprint
    checks = [Check("the original is the one that was erased from", same and not changed, finding)]
    with TemporaryDirectory() as place:
        again = save(pipe, Path(place) / "again", variant=record.variant)
        checks.append(_compared(folder, record, again, Record.read(again), erasure.originals))
    return checks


def _original(source: Path, record: Record, edited: Mapping[str, Tensor]) -> DiffusionPipeline:
    dtype = next((weight.dtype for weight in edited.values()), torch.float32)
    # another repository has other commits
    revision = record.facts.base_revision if str(source) == record.facts.base else None
    with reading(source):
        cls = pipeline_class(record.facts.pipeline)
        pipe = cls.from_pretrained(str(source), dtype=dtype, use_safetensors=True, revision=revision)
        kind = record.facts.device.split()[0]
        return pipe.to(kind if torch.get_device_module(kind).is_available() else "cpu")


def _compared(
    folder: Path, record: Record, again: Path, now: Record, originals: Mapping[str, Tensor]
) -> Check:
    """Whether the tensors of both folders are the same: bit for bit, or by how much not."""
    # 1. The size of each edited layer's edit.
    edits = {}
    stored = read_weights(folder, record).edited
    for component, prefix in record.prefixes.items():
        for layer in stored.keys() & originals.keys():
            if layer.startswith(prefix):
                edit = (stored[layer].double() - originals[layer].double()).norm()
                edits[f"{component}/{layer.removeprefix(prefix)}.weight"] = edit
    # 2. How far the tensors that differ are apart, and whether that is rounding.
    apart, passed = {}, True
    with reading(folder), ExitStack() as stack:
        first, second = _tensors(folder, record, stack), _tensors(again, now, stack)
        for name in first.keys() | second.keys():
            if name not in first or name not in second:
                apart[name], passed = math.inf, False
                continue
            a, b = first[name](), second[name]()
            if a.dtype != b.dtype or not torch.equal(a, b):
                apart[name], most = _distance(a, b, edits.get(name))
                passed &= apart[name] <= most  # false for a NaN
    parts = [f"{len(first)} tensors, bit for bit"]
    if apart:
        worst = max(apart, key=apart.get)
        by = f"{apart[worst]:.1e} of its {'edit' if worst in edits else 'size'}"
        parts = [f"{len(apart)} of {len(first)} tensors differ, `{worst}` by {by}"]
    # 3. What the two runs differed in.
    then, today = (
        {"more_hf": one.more_hf, **one.versions, "device": one.facts.device} for one in (record, now)
    )
    parts += [
        f"{key} was {then.get(key)}, is {value}" for key, value in today.items() if then.get(key) != value
    ]
    return Check("erased again, it is the same", passed, "; ".join(parts))


def _distance(a: Tensor, b: Tensor, edit: Tensor | None) -> tuple[float, float]:
    """How far a tensor is off, relative to its edit or else its size, and how far rounding may take it."""
    if a.shape != b.shape:
        return math.inf, 0.0
    off = (a.double() - b.double()).norm() / (a.double().norm() if edit is None else edit)
    rounding = max(torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0 for x in (a, b))
    return float(off), rounding if edit is None else SAME


def _tensors(folder: Path, record: Record, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """What reads each tensor of the weight files that a record lists."""
    readers = {}
    for path in map(Path, record.files):
        if WEIGHTS.fullmatch(path.name):
            file = stack.enter_context(safe_open(folder / path, "pt"))
            readers |= {f"{path.parent}/{key}": partial(file.get_tensor, key) for key in file.keys()}
    return readers
