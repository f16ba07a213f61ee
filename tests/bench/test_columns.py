import csv

import numpy as np
import pytest

from more_hf_bench.columns import Column, append_row, read_cells, read_rows, rounded, write_rows


def test_rows_come_back(tmp_path):
    rows = [{"prompt": 'a "cat", =1+1', "n": 3, "lpips": None}, {"prompt": "a\ndog", "n": None, "lpips": 0.5}]
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, rows)
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [
            {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
        ]
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]
    append_row(path, {"n": 4, "lpips": 0.25, "prompt": ""})
    assert read_cells(path)[2] == {"prompt": "", "n": "4", "lpips": "0.25"}
    assert read_cells(tmp_path / "none.csv") == []


def test_text_that_looks_like_numbers_is_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("method,forget,style_before,lpips,n_f\nNA,3,,0.1,\nnone,04,A,,5\n", encoding="utf-8")
    rows = read_rows(path)
    texts = rows[["method", "forget", "style_before"]]
    assert texts.values.tolist() == [["NA", "3", ""], ["none", "04", "A"]]
    np.testing.assert_array_equal(rows[["lpips", "n_f"]], [[0.1, np.nan], [np.nan, 5]])
    write_rows(path, rows)
    assert path.read_text("utf-8").splitlines()[1] == "NA,3,,0.1,"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, [{"a": 1}])
    with pytest.raises(UnicodeEncodeError):
        write_rows(path, [{"a": "\ud800"}])
    assert path.read_text() == "a\n1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_numbers_of_a_table():
    up, down = Column("acc_r", "%", "up"), Column("lpips_r", better="down")
    neither = Column("mia_loss")
    assert [column.header for column in (up, down, neither)] == ["acc_r ↑", "lpips_r ↓", "mia_loss"]
    assert [up.format(99.123, 2), down.format(0.00012, 2), up.format(None, 2)] == ["99.12", "1.2e-04", ""]
    assert rounded({"a": 0.12345678, "b": np.nan, "c": 3, "d": "x"}) == {
        "a": 0.123457, "b": None, "c": 3, "d": "x",
    }  # fmt: skip
