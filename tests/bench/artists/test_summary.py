import csv

import pytest
from support.rows import frame, row

from more_hf_bench.artists.summary import summarise
from more_hf_bench.artists.tables import short_table


TEN_ROWS = """
case_number,sample,artist,group,lpips,style_before,style_after,content_before,content_after
1,0,A,one,0.4,A,B,1,1
1,1,A,one,0.6,A,A,1,0
2,0,A,one,0.5,A,B,1,1
2,1,A,one,0.7,C,B,0,0
3,0,B,one,0.1,B,B,1,1
4,0,C,one,0.2,C,A,1,1
5,0,D,two,0.3,D,D,1,0
6,0,D,two,0.1,B,D,0,1
7,0,,,0.05,B,B,1,1
8,0,,,0.15,B,B,1,0
"""


def ten_rows(**changes):
    rows, given = [], {"retain": "C; a dog", "seconds_prepare": 3.0, "peak_memory": 100.0}
    for i, cells in enumerate(csv.DictReader(TEN_ROWS.split())):
        numbers = {name: int(cells[name]) for name in ("case_number", "sample")}
        numbers |= {name: int(cells[name]) for name in ("content_before", "content_after")}
        numbers |= dict.fromkeys(("lpips", "lpips_64", "lpips_64_rece"), float(cells["lpips"]))
        rows.append(row(**{**given, **cells, **numbers, **changes, "seconds": float(i)}))
    return rows


def test_the_summary_of_ten_rows_by_hand():
    confusion = {"B": {"A": 12.0, "B": 88.0}, "A": {"A": 90.0, "B": 10.0}}
    (line,) = summarise(frame(ten_rows()), confusion=confusion)
    by_hand = {
        "method": "m", "forget": "A", "n_f": 4, "n_r": 4, "n_none": 2,
        "lpips_f": 0.55, "lpips_f_low": 0.5, "lpips_f_high": 0.6,
        "lpips_r": 0.175, "lpips_d": 0.375, "lpips_r_group": 0.15,
        "lpips_named": 0.15, "lpips_named_low": 0.15,  # one prompt of each artist
        "lpips_unnamed": 0.2, "lpips_unnamed_low": 0.1, "lpips_unnamed_high": 0.3,
        "lpips_none": 0.1, "lpips_64_f": 0.55, "lpips_64_rece_d": 0.375,
        "style_f": 25.0, "style_f_before": 75.0, "style_f_change": -50.0,
        "style_r": 75.0, "style_r_before": 75.0, "style_r_change": 0.0,
        "style_r_change_low": -25.0, "style_r_change_high": 25.0,  # C loses its one, D draws two of (0, +1)
        "content_f": 50.0, "content_f_before": 75.0, "content_r": 75.0, "content_r_before": 75.0,
        "content_none": 50.0, "content_none_before": 100.0, "style_f_real": 12.0,
        "seconds_prepare": 3.0, "seconds_per_image": 4.5, "peak_memory": 100.0,
    }  # fmt: skip
    assert {key: line[key] for key in by_hand} == pytest.approx(by_hand)


def test_clip_scores_are_columns_where_clip_judged():
    (without,) = summarise(frame(ten_rows()))
    assert not [name for name in without if name.startswith("clip")]
    scored = [{**cells, "clip_before": 30.0, "clip_after": 20.0 + i} for i, cells in enumerate(ten_rows())]
    (line,) = summarise(frame(scored))
    assert (line["clip_f_before"], line["clip_f"]) == (30.0, 21.5)  # rows 0 to 3
    assert (line["clip_r"], line["clip_r_change"]) == (25.5, -4.5)  # rows 4 to 7
    assert short_table([line])[0]["clip_f"] == "30.0 → 21.5"


def test_erasures_are_pooled_over_prompts():
    lines = summarise(frame([*ten_rows(), *ten_rows(forget="D", retain="")]))
    assert [line["forget"] for line in lines] == ["A", "D", "all"]
    pooled = lines[-1]
    assert (pooled["n_f"], pooled["n_r"]) == (4 + 2, 4 + 6)
    assert pooled["lpips_f"] == pytest.approx((4 * 0.55 + 2 * 0.2) / 6)
    assert pooled["lpips_r"] == pytest.approx((4 * 0.175 + 4 * 0.55 + 0.1 + 0.2) / 10)
    assert pooled["style_f_real"] is None
