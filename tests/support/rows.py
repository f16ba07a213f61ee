"""Rows of a benchmark of artists, of which a test says only what matters to it."""

import pandas as pd

from more_hf_bench.artists.rows import measured
from more_hf_bench.columns import read_rows


UNSAID = {
    "method": "m",
    "forget": "A",
    "remap_to": "B",
    "retain": "",
    "case_number": 0,
    "sample": 0,
    "evaluation_seed": 0,
    "artist": "",
    "thing": "",
    "group": "",
    "prompt": "",
    "lpips": 0.0,
    "lpips_64": 0.0,
    "lpips_64_rece": 0.0,
    "style_before": "",
    "style_after": "",
    "content_before": None,
    "content_after": None,
    "seconds": 0.0,
    "seconds_prepare": None,
    "peak_memory": None,
    "before": "",
    "after": "",
    "level": "",
}


def row(**cells) -> dict:
    return {**UNSAID, **cells}


def frame(rows, config=None) -> pd.DataFrame:
    numbers = ["content_before", "content_after", "seconds_prepare", "peak_memory"]
    return measured(pd.DataFrame(rows).astype(dict.fromkeys(numbers, float)), config)


def rows_of(folder) -> list:
    """The rows of a folder, as named tuples."""
    return list(read_rows(folder / "rows.csv").itertuples())


def records(path) -> list[dict]:
    """The rows of a file of any benchmark, with `None` where a number is missing."""
    rows = read_rows(path).astype(object)
    return rows.where(rows.notna(), None).to_dict("records")
