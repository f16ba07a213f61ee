import re

import pandas as pd
import pytest
from PIL import Image

from more_hf.core.markdown import markdown_table, number
from more_hf_bench.columns import Column
from more_hf_bench.page import Section, write_page
from more_hf_bench.tables import compare, pivot


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
    ("value", "text"), [(0.0, "0.000"), (-0.25, "-0.250"), (True, "True"), (None, ""), (7, "7")]
)
def test_number(value, text):
    assert number(value) == text


def test_the_page_is_self_contained_and_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    Image.new("RGB", (256, 256), "blue").save(tmp_path / "large.png")
    pictures = {evil: Image.new("RGB", (64, 64), "red"), "large": tmp_path / "large.png"}
    path = tmp_path / "report.html"
    write_page(
        path,
        title=evil,
        finding=evil,
        sections=[
            Section(evil, evil, facts=[evil, "`router`: none"]),
            Section(
                "table",
                table=[{evil: evil, "n_f ↓": 3, "0.001": f"**0.5** {evil}", "empty": None}],
                files=["table.md"],
                folded=True,
            ),
            Section("pictures", pictures=pictures),
        ],
        words={"n_f": f"pictures {evil}"},
    )
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("<details>") == 1
    assert "<th>pictures &lt;script" in page
    assert page.count("<th>") == 3  # a column without a value is left out
    assert '<a href="table.md">' in page
    assert page.count('src="data:image/') == 2
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r'src="[^"]*"', "", page))
    assert "<li><code>router</code>: none</li>" in page
    assert "<td>3</td><td><b>0.5</b> &lt;script" in page
    assert "prefers-color-scheme: dark" in page


def line(method, forget, hm, kept):
    ends = {"hm_low": hm - 1, "hm_high": hm + 1, "kept_before": 50.0}
    return {"method": method, "forget": forget, "hm": hm, "kept": kept, **ends}


def test_the_best_of_several_is_bold():
    summary = [line("original", "a", 99.0, 0.1), line("x", "a", 80.0, 0.2), line("y", "a", 90.0, None)]
    summary += [line("y", "b", 70.0, 0.00012)]  # alone
    columns = [Column("hm", "%", "up"), Column("kept", better="down"), Column("lacking")]
    options = {"references": ["original"], "decimals": 1}
    rows = compare(summary, ["method"], columns, **options)
    assert [row["hm ↑"] for row in rows] == ["99.0", "80.0", "**90.0**", "70.0"]
    assert [row["kept ↓"] for row in rows] == ["0.100", "0.200", "", "1.2e-04"]
    assert list(rows[0]) == ["method", "hm ↑", "kept ↓"]
    rows = compare(summary[:3], [], columns[:1], interval_decimals=0, **options)
    assert rows[2] == {"hm ↑": "**90.0** [89, 91]"}
    rows = compare(summary[:3], [], [Column("kept", "%", "up")], before=["kept"], **options)
    assert [row["kept ↑"] for row in rows] == ["50.0 → 0.1", "50.0 → 0.2", "50.0 → "]


def test_a_pivot_keeps_the_order_of_its_lines():
    cells = [("b", "y", "1"), ("b", "x", "2"), ("a", "y", "3")]
    table = pivot(pd.DataFrame(cells, columns=["method", "level", "cell"]), ["method"], "level")
    assert [list(row.items()) for row in table] == [
        [("method", "b"), ("y", "1"), ("x", "2")],
        [("method", "a"), ("y", "3"), ("x", "")],
    ]
