"""
Where a benchmark keeps its pictures: one folder per cell (a method and an erasure), with a picture and a JSON
file per case.

Files are written atomically, and a case counts only once its JSON file exists, so any number of processes may
write and be killed at any point.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from more_hf.core.files import replacing, write_text

from ..run import Cell, short_hash
from .config import ArtistsConfig
from .grid import to_pil
from .prompts import PromptRow
from .rows import COLUMNS, ORIGINAL, SEPARATOR


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


@dataclass(frozen=True)
class Picture(Cell):
    """The picture of one case, a PNG file beside the cell's own."""

    case: Case = field(kw_only=True)

    @property
    def image(self) -> Path:
        return self.path.with_suffix(".png")

    def write(self, measured: Mapping[str, Any], image: Tensor) -> None:
        """Write the picture, then its measurements."""
        with replacing(self.image) as draft:
            to_pil(image).save(draft, "png")
        case = self.case
        facts = {**asdict(case.row), "evaluation_seed": case.seed, "sample": case.sample, **measured}
        write_text(self.path, json.dumps(facts))


@dataclass(frozen=True)
class Pictures:
    """The folder of one method and erasure, named by a hash of everything that its pictures depend on."""

    output: Path
    config: ArtistsConfig
    method: str
    forget: str

    @cached_property
    def folder(self) -> Path:
        if self.method == ORIGINAL:
            # The original's pictures do not depend on what is erased, so all erasures share them.
            determining = [asdict(self.config.generation)]
        else:
            determining = self.config.determining(self.method, self.forget)
        return self.output / "images" / short_hash(determining)

    def of(self, cases: Iterable[Case]) -> list[Picture]:
        """The cells of cases."""
        return [
            Picture(self.method, self.forget, self.folder / f"{case.name}.json", case=case) for case in cases
        ]

    @property
    def cost(self) -> Cell:
        """The cost of the erasure."""
        return Cell(self.method, self.forget, self.folder / "cell.json")

    def measurements(self) -> dict[str, dict[str, Any]]:
        """The measurements by case name, in the order of case and sample."""
        done = [json.loads(path.read_text("utf-8")) for path in self.folder.glob("[0-9]*_*.json")]
        done.sort(key=lambda facts: (facts["case_number"], facts["sample"]))
        return {f"{facts['case_number']}_{facts['sample']}": facts for facts in done}


def collect_rows(output: Path, config: ArtistsConfig) -> list[dict[str, Any]]:
    """Every completed row, one per image and method, from the JSON files."""
    original = Pictures(output, config, ORIGINAL, "")
    before = original.measurements()
    rows = []
    for method in config.methods:
        for forget in config.forget:
            cell = Pictures(output, config, method, forget)
            after = before if method == ORIGINAL else cell.measurements()
            rows += _rows_of(cell, config, original, before, after)
    return rows


def _rows_of(
    cell: Pictures,
    config: ArtistsConfig,
    original: Pictures,
    before: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of one cell, from the measurements of the original's pictures and of its own, by case name."""
    erasure = config.forget[cell.forget]
    arguments = config.arguments(cell.method, cell.forget)
    cost = cell.cost.read() if cell.cost.is_done else {}
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
        clip = {}
        if "clip_score" in measured:
            clip = {"clip_before": before[name].get("clip_score"), "clip_after": measured["clip_score"]}
        row = {
            "level": "",  # missing in older cells
            **measured,
            "method": cell.method,
            "forget": cell.forget,
            "remap_to": SEPARATOR.join(arguments.remap_to or ["none"]),
            "retain": retain,
            "style_before": before[name]["style"] or "",
            "style_after": measured["style"] or "",
            "content_before": before[name]["content"],
            "content_after": measured["content"],
            "seconds_prepare": cost.get("seconds_prepare"),
            "peak_memory": cost.get("peak_memory"),
            "before": f"{original.folder.name}/{name}.png",
            "after": f"{cell.folder.name}/{name}.png",
        }
        rows.append({column: row[column] for column in COLUMNS} | clip)
    return rows
