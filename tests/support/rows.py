"""Rows of a benchmark of artists, of which a test says only what matters to it."""

import pandas as pd

from more_hf_bench.artists.rows import measured
from more_hf_bench.columns import read_rows


TEXTS = (
    "retain",
    "artist",
    "thing",
    "group",
    "prompt",
    "style_before",
    "style_after",
    "before",
    "after",
    "level",
)
NOTHING = ("content_before", "content_after", "seconds_prepare", "peak_memory")
UNSAID = {"method": "m", "forget": "A", "remap_to": "B"}
UNSAID |= dict.fromkeys(("case_number", "sample", "evaluation_seed"), 0)
UNSAID |= dict.fromkeys(("lpips", "lpips_64", "lpips_64_rece", "seconds"), 0.0)
UNSAID |= {**dict.fromkeys(TEXTS, ""), **dict.fromkeys(NOTHING)}


def row(**cells) -> dict:
    return {**UNSAID, **cells}


def frame(rows, config=None) -> pd.DataFrame:
    return measured(pd.DataFrame(rows).astype(dict.fromkeys(NOTHING, float)), config)


def rows_of(folder) -> list:
    """The rows of a folder, as named tuples."""
    return list(read_rows(folder / "rows.csv").itertuples())


def records(path) -> list[dict]:
    """The rows of a file of any benchmark, with `None` where a number is missing."""
    rows = read_rows(path).astype(object)
    return rows.where(rows.notna(), None).to_dict("records")
