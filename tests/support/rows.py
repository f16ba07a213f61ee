"""Rows of a benchmark of artists, of which a test says only what matters to it."""

from more_hf_bench.artists.rows import Row


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
}


def row(**cells) -> Row:
    return Row(**{**UNSAID, **cells})
