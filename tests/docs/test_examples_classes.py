import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageClassification

from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.training import accuracy, predict


pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "erase_vit_class.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the example with arguments; what it printed and its folder."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--output", str(tmp_path / "out"), *arguments])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out, tmp_path / "out"

    return call


def table(text):
    """{class: [before, after, saved and loaded]}"""
    rows = re.findall(r"^\| (\d)( \(forgotten\))? +\|(.+)\|$", text, re.MULTILINE)
    return {name + forgotten: [float(cell) for cell in cells.split("|")] for name, forgotten, cells in rows}


def test_erase_vit_class(run):
    """The default: 3 is gone, also from what was saved; the others together lose less than two points."""
    text, folder = run()
    rows = table(text)
    assert list(rows) == ["0", "1", "2", "3 (forgotten)", *"456789"]
    before, after, saved = rows.pop("3 (forgotten)")
    assert before > 90
    assert after == saved == 0
    assert all(values[1] == values[2] for values in rows.values())
    means = [sum(values[i] for values in rows.values()) / 9 for i in range(2)]
    assert means[0] - means[1] < 2
    assert Image.open(folder / "before_after.png").size == (1650, 495)
    assert float(re.search(r"forgotten prototypes: (\S+)\)", text)[1]) > 0.999
    assert re.search(r"^sent to +3 → the mean of ", text, re.MULTILINE)
    # the table's columns are what the saved model says of the data
    test = load_kd_data("digits").test
    predicted = predict(AutoModelForImageClassification.from_pretrained(folder), test)
    four = test.labels == 4
    assert accuracy(predicted[four], test.labels[four]) == pytest.approx(rows["4"][2], abs=1e-3)
    assert not (predicted == 3).any()


def test_with_arguments(run):
    text, _ = run("--classifier", "digits-vit", "--forget", "0", "7", "--remap_to", "1", "--limit", "200")
    rows = table(text)
    assert rows["0 (forgotten)"][1] == rows["7 (forgotten)"][1] == 0
    assert "0 → 1; 7 → 1" in text
    assert "200 images" in text
