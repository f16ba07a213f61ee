"""
Where a benchmark keeps its pictures: one folder per cell (a method and an erasure), with a picture and a JSON
file per case.

Files are written atomically, and a case counts only once its JSON file exists, so any number of processes may
write and be killed at any point.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from more_hf.core.files import replacing, write_text

from ..run import short_hash
from .config import ArtistsConfig
from .grid import read_image, to_pil
from .prompts import PromptRow
from .rows import ORIGINAL, SEPARATOR, Row


SEED_STEP = 100_000  # between the seeds of a prompt's images
PREPARED = "cell.json"


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


@dataclass(frozen=True)
class Measured:
    """The measurements of one picture: distances to the original's by name, and what the judges see."""

    distances: Mapping[str, float]
    style: str | None
    content: int | None
    seconds: float


class Cell:
    """
    The folder of one method and erasure, named by a hash of everything that its pictures depend on.
    """

    def __init__(self, output: Path, config: ArtistsConfig, method: str, forget: str):
        self.method, self.forget = method, forget
        if method == ORIGINAL:
            # The original's pictures do not depend on what is erased, so all erasures share them.
            determining = [asdict(config.generation)]
        else:
            determining = config.determining(method, forget)
        self.folder = output / "images" / short_hash(determining)

    def picture(self, case_name: str) -> Path:
        return self.folder / f"{case_name}.png"

    def missing(self, cases: Iterable[Case]) -> list[Case]:
        """The cases that have no measurements yet."""
        return [case for case in cases if not (self.folder / f"{case.name}.json").is_file()]

    def write(self, case: Case, image: Tensor, measured: Measured) -> None:
        """Write a picture, then its measurements; from then on the case counts."""
        with replacing(self.picture(case.name)) as draft:
            to_pil(image).save(draft, "png")
        facts = {
            **asdict(case.row),
            "evaluation_seed": case.seed,
            "sample": case.sample,
            **measured.distances,
            "style": measured.style,
            "content": measured.content,
            "seconds": measured.seconds,
        }
        write_text(self.folder / f"{case.name}.json", json.dumps(facts))

    def read(self, cases: Iterable[Case]) -> Tensor:
        """The pictures of cases, uint8 `(n, 3, H, W)`."""
        return torch.stack([read_image(self.picture(case.name)) for case in cases])

    def write_prepared(self, facts: Mapping[str, Any]) -> None:
        """Write the cost of the erasure, unless it was written before."""
        path = self.folder / PREPARED
        if not path.is_file():
            write_text(path, json.dumps(facts, indent=1))

    def prepared(self) -> dict[str, Any]:
        """The cost of the erasure; empty if unknown."""
        path = self.folder / PREPARED
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def measurements(self) -> dict[str, dict[str, Any]]:
        """The measurements by case name, in the order of case and sample."""
        done = [json.loads(path.read_text("utf-8")) for path in self.folder.glob("[0-9]*_*.json")]
        done.sort(key=lambda facts: (facts["case_number"], facts["sample"]))
        return {f"{facts['case_number']}_{facts['sample']}": facts for facts in done}


def collect_rows(output: Path, config: ArtistsConfig) -> list[Row]:
    """Every completed row, one per image and method, from the JSON files."""
    original = Cell(output, config, ORIGINAL, "")
    before = original.measurements()
    rows = []
    for method in config.methods:
        for forget in config.forget:
            cell = Cell(output, config, method, forget)
            after = before if method == ORIGINAL else cell.measurements()
            rows += _rows_of(cell, config, original, before, after)
    return rows


def _rows_of(
    cell: Cell,
    config: ArtistsConfig,
    original: Cell,
    before: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """The rows of one cell, from the measurements of the original's pictures and of its own, by case name."""
    erasure = config.forget[cell.forget]
    arguments, prepared = config.arguments(cell.method, cell.forget), cell.prepared()
    retain = SEPARATOR.join(arguments.retain)
    if erasure.names is not None:
        retain = f"{len(arguments.retain)} names"
    rows = []
    for name, measured in after.items():
        # The original's folder holds the cases and further seeds of every erasure, not only of this one.
        if measured["sample"] and measured[config.of_kind.one] not in erasure.forgotten(cell.forget):
            continue
        if erasure.cases is not None and measured["case_number"] not in erasure.cases:
            continue
        rows.append(
            Row(
                method=cell.method,
                forget=cell.forget,
                remap_to=SEPARATOR.join(arguments.remap_to or ["none"]),
                retain=retain,
                case_number=measured["case_number"],
                sample=measured["sample"],
                evaluation_seed=measured["evaluation_seed"],
                artist=measured["artist"],
                thing=measured["thing"],
                group=measured["group"],
                prompt=measured["prompt"],
                lpips=measured["lpips"],
                lpips_64=measured["lpips_64"],
                lpips_64_rece=measured["lpips_64_rece"],
                style_before=before[name]["style"] or "",
                style_after=measured["style"] or "",
                content_before=before[name]["content"],
                content_after=measured["content"],
                seconds=measured["seconds"],
                seconds_prepare=prepared.get("seconds_prepare"),
                peak_memory=prepared.get("peak_memory"),
                before=f"{original.folder.name}/{name}.png",
                after=f"{cell.folder.name}/{name}.png",
                level=measured.get("level", ""),  # missing in older cells
                kind=config.of_kind,
                erasure=erasure,
            )
        )
    return rows
