import pytest
from support.rows import frame, row

from more_hf_bench.artists.ranking import rank, winner


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
