"""What is said of rows: the summary by hand, the ranking, the finding in a sentence."""

import csv
import re

import pytest
from support.rows import frame, row

from more_hf_bench.artists.findings import Finding, finding
from more_hf_bench.artists.ranking import rank, winner
from more_hf_bench.artists.summary import summarise
from more_hf_bench.artists.tables import short_table
from more_hf_bench.tables import share


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


def rows_of(method, far, near, *, styles=1, content=10, prompts=10, forget="A"):
    """Ten forgotten pictures, `styles` of them recognised, `content` with their thing; and ten others."""
    common = {"method": method, "forget": forget, "content_before": 1}
    rows = []
    for i in range(prompts):
        own = {"artist": forget, "case_number": i, "lpips": far[i], "style_after": "A" if i < styles else "B"}
        rows.append(row(**common, **own, content_after=int(i < content)))
        other = {"artist": "B", "case_number": 100 + i, "lpips": near[i], "style_after": "B"}
        rows.append(row(**common, **other, content_after=1))
    return rows


SPREAD = [0.1 * i for i in range(10)]


def test_the_winner_by_paired_intervals():
    flat = [0.0] * 10
    rows = rows_of("noise", [2.0] * 10, flat, content=0)
    rows += rows_of("first", [x + 0.30 for x in SPREAD], flat)
    # Always 0.05 less: a loss, though the spread over prompts is far larger.
    rows += rows_of("behind", [x + 0.25 for x in SPREAD], flat)
    # 0.01 less on average, and far more or less prompt by prompt.
    rows += rows_of("tied", [x + 0.29 for x in reversed(SPREAD)], flat)
    rows += rows_of("recognised", [1.0] * 10, flat, styles=2)
    rows += rows_of("emptied", [1.0] * 10, flat, content=8)
    ranking = rank(frame(rows))
    assert [(line["method"], line["qualifies"]) for line in ranking] == [
        ("first", "yes"), ("tied", "yes"), ("behind", "yes"),
        ("recognised", "no"), ("emptied", "no"), ("noise", "control"),
    ]  # fmt: skip
    by = {line["method"]: line for line in ranking}
    assert by["first"]["lpips_d"] == pytest.approx(0.75)
    assert [by["behind"][f"behind{end}"] for end in ("", "_low", "_high")] == pytest.approx(
        [0.05, 0.05, 0.05]
    )
    assert by["tied"]["behind_low"] < 0 < by["tied"]["behind_high"]
    assert winner(ranking).startswith("first, tied with tied, over one erasure.")
    assert "10 %" in winner(ranking)
    assert winner([line for line in ranking if line["qualifies"] != "yes"]).startswith("Nobody.")


def test_only_pictures_that_every_method_has_are_compared():
    far, flat = [0.5] * 10, [0.0] * 10
    rows = rows_of("a", far, flat) + rows_of("b", [0.4] * 10, flat)
    easy = rows_of("a", [9.0] * 10, flat, forget="C")  # an erasure that b does not have
    joint = rows_of("a", far, flat, forget="A+C") + rows_of("b", [9.0] * 10, flat, forget="A+C")
    ranking = rank(frame([*rows[:-2], *easy, *joint]))
    assert [line["lpips_d"] for line in ranking] == pytest.approx([0.5, 0.4])
    assert [line["erasures"] for line in ranking] == [1, 1]
    assert rank(frame(rows_of("a", far, flat) + rows_of("noise", far, flat))) == []
    unjudged = [{**each, "style_after": ""} for each in rows]
    assert rank(frame(unjudged)) == []


@pytest.mark.parametrize(
    ("percent", "text"), [(0, "none"), (100, "all"), (79.6, "80 %"), (0.4, "under 1 %"), (99.6, "over 99 %")]
)
def test_share(percent, text):
    assert share(percent) == text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((80.0, 0.0, 100.0, 96.0, 0.4, 0.006), r"in 80 % .* before and in none after; .* 0\.006 LPIPS"),
        ((80.0, 60.0, 100.0, 96.0, 0.1, 0.006), "did not succeed"),
        ((5.0, 0.0, 100.0, 96.0, 0.1, 0.006), "hardly anything to erase"),
        ((80.0, 0.0, 100.0, 20.0, 0.5, 0.006), r"seen in 20 % of them \(all before\)"),
        ((80.0, 0.0, 100.0, 96.0, 0.5, 0.03), "one has to look for"),
        ((80.0, 0.0, 100.0, 96.0, 0.5, 0.3), "plain to see"),
        ((None, None, None, None, 0.5, 0.006), "nobody judged"),
    ],
)
def test_what_an_erasure_did_is_said(values, words):
    assert re.search(words, str(Finding("Noto", *values)))
    joint = "A, B and C are recognised" if values[0] else "A, B and C"
    assert joint in str(Finding("A+B+C", *values))


def line(method, forget, lpips_r):
    judged = {"style_f_before": 70.0, "style_f": 5.0, "content_f_before": 90.0, "content_f": 90.0}
    return {"method": method, "forget": forget, **judged, "lpips_f": 0.4, "lpips_r": lpips_r}


def test_the_finding_is_over_all_erasures_of_the_first_method_that_is_no_control():
    summary = [line("noise", "Noto", 0.0), line("more", "Noto", 0.1), line("more", "all", 0.002)]
    text = finding(summary, [])
    assert text.startswith("After more: the forgotten artist is recognised in 70 %")
    assert "0.002" in text
    assert "Only controls" in finding(summary[:1], [])
