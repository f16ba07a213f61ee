import csv

import pytest

from more_hf_bench.columns import Column, append_row, read_cells, read_rows, write_rows


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


FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1+1", "''=1")


@pytest.mark.parametrize("text", FORMULAS)
def test_a_text_is_not_written_as_a_formula_and_read_back(tmp_path, text):
    path = tmp_path / "rows.csv"
    write_rows(path, [{"prompt": text, "lpips": -0.5}])
    append_row(path, {"lpips": -0.5, "prompt": text})
    with open(path, newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert [line["prompt"][0] for line in cells] == ["'", "'"]
    assert [line["lpips"] for line in cells] == ["-0.5", "-0.5"]
    assert read_rows(path, [Column("prompt", str), Column("lpips")]) == [{"prompt": text, "lpips": -0.5}] * 2


@pytest.mark.parametrize("text", ["", "a cat", "'a cat'", "-0.5", "+1e3", "'90s"])
def test_other_texts_and_numbers_are_written_as_they_are(tmp_path, text):
    path = tmp_path / "rows.csv"
    write_rows(path, [{"a": text, "b": 1}])
    with open(path, newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["a"] == text
    assert read_cells(path) == [{"a": text, "b": "1"}]


def test_rows_are_read_by_their_columns_types(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, [{"name": "", "n": 3, "lpips": None, "other": "x"}])
    columns = [Column("name", str), Column("n", int), Column("lpips")]
    assert read_rows(path, columns) == [{"name": "", "n": 3, "lpips": None}]
    with pytest.raises(ValueError, match="no column 'seconds'"):
        read_rows(path, [Column("seconds")])
    assert read_rows(path, [Column("n", int), Column("seconds", added=True)]) == [{"n": 3, "seconds": None}]
    assert read_cells(tmp_path / "none.csv") == []


def test_the_direction_of_a_column():
    up, down, neither = (
        Column("acc_r", unit="%", better="up"),
        Column("lpips_r", better="down"),
        Column("mia_loss"),
    )
    assert [column.header for column in (up, down, neither)] == ["acc_r ↑", "lpips_r ↓", "mia_loss"]
    values = [0.5, None, 2.0]
    assert [column.best(values) for column in (up, down, neither)] == [2.0, 0.5, None]
    assert up.best([None]) is None
    assert [up.format(99.123, 2), down.format(0.00012, 2), up.format(None, 2)] == ["99.12", "1.2e-04", ""]
