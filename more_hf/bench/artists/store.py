"""Where a benchmark keeps what it made: one folder per cell (a method, an erasure), one picture and one JSON per case.

Everything is written beside its place and renamed, and a case counts only when its JSON is there, so that any number of processes may
write and be killed at any point.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.files import write_text
from ..errors import BenchmarkError
from ..methods.registry import DIFFUSION, UNREGISTERED
from .images import to_pil
from .prompts import PromptRow
from .summary import SEPARATOR, artists_of


ORIGINAL = "original"
SAME_FOR_ALL = ("generation", "seeds", "limit", "judges")  # keys of the configuration that one folder has only once
SEED_STEP = 100_000  # between the seeds of a prompt's images


@dataclass(frozen=True)
class Case:
    """One picture: a prompt and the number of its image, 0 for the prompt's own seed."""

    row: PromptRow
    sample: int = 0

    @property
    def name(self) -> str:
        return f"{self.row.case_number}_{self.sample}"

    @property
    def seed(self) -> int:
        return self.row.evaluation_seed + SEED_STEP * self.sample


def told(config: Mapping[str, Any], method: str, forget: str) -> dict[str, list[str] | None]:
    """What a method is told about an erasure: its targets (`remap_to`), and what to keep besides them (`retain`).

    Raises `BenchmarkError` where a method takes several targets and the erasure has none declared.
    """
    asked = config["forget"][forget]
    wanted = DIFFUSION.get(method, UNREGISTERED).targets
    targets = None if wanted == "none" else asked["several" if wanted == "several" else "remap_to"]
    if targets is None and wanted == "several":
        raise BenchmarkError(f"{method} needs several targets, and there are none for {forget!r}. Give them, or leave the method out.")
    return {"remap_to": targets, "retain": [name for name in asked["retain"] if name not in (targets or ())]}


def cell_name(config: Mapping[str, Any], method: str, forget: str | None) -> str:
    """The folder of a cell: a hash of everything that determines its pictures. The original's are the same whatever is erased."""
    determines = [config["generation"]]
    if method != ORIGINAL:
        determines += [method, config["methods"][method], forget, told(config, method, forget)]
    return hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:16]


class Cell:
    """The folder of one method and erasure."""

    def __init__(self, output: Path, config: Mapping[str, Any], method: str, forget: str | None):
        self.method, self.forget = method, forget
        self.folder = output / "images" / cell_name(config, method, forget)

    def picture(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    def is_done(self, case: Case) -> bool:
        return (self.folder / f"{case.name}.json").is_file()

    def missing(self, cases: Iterable[Case]) -> list[Case]:
        return [case for case in cases if not self.is_done(case)]

    def write(self, case: Case, image: Tensor, measured: Mapping[str, Any]) -> None:
        """Put a picture there, then what was measured on it; from then on the case counts."""
        path = self.picture(case.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            to_pil(image).save(beside, "png")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        facts = {**asdict(case.row), "evaluation_seed": case.seed, "sample": case.sample, **measured}
        write_text(self.folder / f"{case.name}.json", json.dumps(facts))

    def read(self, cases: Iterable[Case]) -> Tensor:
        """The pictures of cases, uint8 `(n, 3, H, W)`."""
        return torch.stack([read_image(self.picture(case.name)) for case in cases])

    def write_prepared(self, facts: Mapping[str, Any]) -> None:
        """What preparing the method cost; the first time stays."""
        path = self.folder / "cell.json"
        if not path.is_file():
            write_text(path, json.dumps(facts, indent=1))

    def facts(self) -> dict[str, dict[str, Any]]:
        """What was measured, by case name, in the order of case and sample."""
        found = [json.loads(path.read_text("utf-8")) for path in self.folder.glob("[0-9]*_*.json")]
        found.sort(key=lambda facts: (facts["case_number"], facts["sample"]))
        return {f"{facts['case_number']}_{facts['sample']}": facts for facts in found}


def read_image(path: Path) -> Tensor:
    """A picture as uint8 `(3, H, W)`."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous()


def read_config(output: Path) -> dict[str, Any] | None:
    """The configuration of a benchmark's folder, or `None` where there is none yet."""
    path = output / "config.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def join_config(old: dict[str, Any] | None, new: dict[str, Any], output: Path) -> dict[str, Any]:
    """The folder's configuration with the methods and erasures of a further run.

    Raises `BenchmarkError`, naming what differs, unless everything that both have is the same.
    """
    if old is None:
        return new
    differing = [key for key in SAME_FOR_ALL if old[key] != new[key]]
    both = [(key, name) for key in ("methods", "forget") for name in old[key] if name in new[key]]
    differing += [f"{key}: {name}" for key, name in both if old[key][name] != new[key][name]]
    if differing:
        told = "; ".join(_difference(key, old, new) for key in differing)
        raise BenchmarkError(f"{output} holds results of another configuration ({told}). Choose another `--output`.")
    return {
        **old,
        "methods": {**old["methods"], **new["methods"]},
        "forget": {**old["forget"], **new["forget"]},
        "runs": [*old["runs"], *new["runs"]],
    }


def _difference(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    place, _, name = key.partition(": ")
    was, now = (config[place][name] if name else config[place] for config in (old, new))
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = [k for k in {**was, **now} if was.get(k) != now.get(k)]
        return ", ".join(f"{name + ' ' if name else ''}{k} is {was.get(k)!r} there, {now.get(k)!r} here" for k in keys)
    return f"{key} is {was!r} there, {now!r} here"


def collect_rows(output: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every completed row, one per image and method, from the JSON files."""
    before, rows = Cell(output, config, ORIGINAL, None), []
    facts_before = before.facts()
    for method in config["methods"]:
        for forget in config["forget"]:
            asked = told(config, method, forget)
            cell = Cell(output, config, method, forget)
            path = cell.folder / "cell.json"
            prepared = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            for name, after in (facts_before if method == ORIGINAL else cell.facts()).items():
                if after["sample"] and after["artist"] not in artists_of(forget):
                    continue  # the original's folder has the further seeds of every erasure
                old = facts_before[name]
                rows.append(
                    {
                        "method": method,
                        "forget": forget,
                        "remap_to": SEPARATOR.join(asked["remap_to"] or ["none"]),
                        "retain": SEPARATOR.join(asked["retain"]),
                        **{key: after[key] for key in ("case_number", "sample", "evaluation_seed", "artist", "thing", "group", "prompt")},
                        **{key: after[key] for key in ("lpips", "lpips_64", "lpips_64_rece")},
                        "style_before": old["style"] or "",
                        "style_after": after["style"] or "",
                        "content_before": old["content"],
                        "content_after": after["content"],
                        "seconds": after["seconds"],
                        "seconds_prepare": prepared.get("seconds_prepare"),
                        "peak_memory": prepared.get("peak_memory"),
                        "before": f"{before.folder.name}/{name}.png",
                        "after": f"{cell.folder.name}/{name}.png",
                    }
                )
    return rows
