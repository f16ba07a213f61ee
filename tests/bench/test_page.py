import re

import pytest
from PIL import Image

from more_hf.core.markdown import markdown_table, number
from more_hf_bench.page import Pair, Section, write_page
from more_hf_bench.tables import Cell


def test_markdown_table():
    rows = [{"name": "a|b", "lpips_f": 0.31234, "n_f": 36}, {"name": "c", "lpips_f": 3.2e-7, "n_f": 4}]
    assert markdown_table(rows) == (
        "| name | lpips_f | n_f |\n"
        "| ---- | ------: | --: |\n"
        "| a\\|b |   0.312 |  36 |\n"
        "| c    | 3.2e-07 |   4 |"
    )
    assert markdown_table(rows, ["n_f", "missing"]).splitlines()[2] == "|  36 |         |"
    with pytest.raises(ValueError, match="columns"):
        markdown_table([])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (-0.25, "-0.250"), (1e-9, "1.0e-09"), (True, "True"), (None, ""), (7, "7")],
)
def test_number(value, text):
    assert number(value) == text


def test_the_page_is_self_contained_and_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    picture = Image.new("RGB", (64, 64), "red")
    large = Image.new("RGB", (256, 256), "blue")
    path = tmp_path / "report.html"
    write_page(
        path,
        title=evil,
        finding=evil,
        sections=[
            Section(evil, evil, facts={evil: [evil, 1.0], "measured": {"G1": 1e-7}, "router": None}),
            Section(
                "table",
                table=[{evil: evil, "n_f ↓": 3, "0.001": Cell("0.5", best=True, suffix=evil), "empty": None}],
                words={"n_f": f"pictures {evil}"},
                files=["table.md"],
                folded=True,
            ),
            Section("pairs", pairs=[Pair(picture, large, f"a CAT {evil}", 0.25)]),
        ],
    )
    page = path.read_text(encoding="utf-8")
    assert evil not in page
    assert page.count("<script>") == 1  # ours
    assert page.count("<details>") == 1
    assert '<th class="num">pictures &lt;script' in page
    assert page.count("<th class") == 3  # a column without a value is left out
    assert '<a href="table.md">' in page
    sources = re.findall(r'src="([^"]{20})', page)
    assert [source.split(";")[0] for source in sources] == ["data:image/png", "data:image/jpeg"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r'src="[^"]*"', "", page))
    assert "LPIPS 0.250" in page
    assert 'data-prompt="a cat' in page
    assert "measured · G1</dt><dd>1.0e-07" in page
    assert '<td class="num">3</td>' in page
    assert '<td class="num"><b>0.5</b>&lt;script' in page
    assert "prefers-color-scheme: dark" in page


def test_a_page_without_pairs_has_no_search_box(tmp_path):
    path = tmp_path / "report.html"
    write_page(path, title="title", finding="finding", sections=[Section("facts", facts={"a": 1})])
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<input" not in page


def test_the_best_of_several_is_bold_in_markdown():
    table = markdown_table(
        [{"method": "a", "hm": Cell("1.0", best=True, prefix="0.5 → ", suffix=" [0.9, 1.1]")}]
    )
    assert table.splitlines()[2] == "| a      | 0.5 → **1.0** [0.9, 1.1] |"
