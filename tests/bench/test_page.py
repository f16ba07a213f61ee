import csv
import re

import pytest
from PIL import Image

from more_hf.bench.columns import write_rows
from more_hf.bench.page import Pair, html_facts, html_pairs, html_table, write_html
from more_hf.core.markdown import markdown_table, number


def test_rows_come_back(tmp_path):
    rows = [{"prompt": 'a "cat", red', "lpips": 0.125}, {"prompt": "a\ndog", "lpips": 0.5}]
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, rows)
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{k: str(v) for k, v in row.items()} for row in rows]
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, [{"a": 1}])
    with pytest.raises(ValueError, match="has the columns"):
        write_rows(path, [{"a": 2}, {"b": 3}])
    with pytest.raises(ValueError, match="No rows"):
        write_rows(path, [])
    with pytest.raises(UnicodeEncodeError):
        write_rows(path, [{"a": "\ud800"}])
    assert path.read_text() == "a\n1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


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
    ("value", "text"), [(0.0, "0.000"), (-0.25, "-0.250"), (1e-9, "1.0e-09"), (True, "True"), (None, ""), (7, "7")]
)
def test_number(value, text):
    assert number(value) == text


def test_the_page_is_self_contained_and_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    picture = Image.new("RGB", (64, 64), "red")
    large = Image.new("RGB", (256, 256), "blue")
    path = tmp_path / "report.html"
    write_html(
        path,
        title=evil,
        intro=evil,
        sections={
            evil: html_facts({evil: [evil, 1.0], "measured": {"G1": 1e-7}, "router": None}),
            "table": html_table([{evil: evil, "n_f": 3}]),
            "pairs": html_pairs([Pair(picture, large, f"a CAT {evil}", 0.25)]),
        },
    )
    page = path.read_text(encoding="utf-8")
    assert evil not in page
    assert page.count("<script>") == 1  # ours
    sources = re.findall(r'(?:src|href)="([^"]{20})', page)
    assert [source.split(";")[0] for source in sources] == ["data:image/png", "data:image/jpeg"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r'src="[^"]*"', "", page))
    assert "LPIPS 0.250" in page
    assert 'data-prompt="a cat' in page
    assert "measured · G1</dt><dd>1.0e-07" in page
    assert "prefers-color-scheme: dark" in page
