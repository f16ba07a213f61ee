import re

import pytest

from more_hf_bench.artists.findings import Finding, finding
from more_hf_bench.tables import share


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
