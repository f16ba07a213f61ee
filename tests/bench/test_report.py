"""The committed tables are those of their rows, and no estimate lies outside its interval."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from more_hf.cli.main import main


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLES = ("summary.csv", "sizes.csv", "levels.csv", "table.md")
OTHERS = ("demo", "evaluation", "order", "tune")  # not of `more-hf bench`
FOLDERS = sorted(path.parent for path in BENCHMARKS.glob("**/rows.csv") if path.parent.name not in OTHERS)


def names(folders):
    return [str(folder.relative_to(BENCHMARKS)) for folder in folders]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=names(FOLDERS))
def test_committed_tables_are_made_again_byte_for_byte(folder, tmp_path):
    for name in ("config.json", "rows.csv", "probes.csv"):
        if (folder / name).is_file():
            shutil.copy(folder / name, tmp_path)
    assert main(["bench", "report", str(tmp_path)]) == 0
    made = [name for name in TABLES if (tmp_path / name).is_file()]
    assert made == [name for name in TABLES if (folder / name).is_file()]
    for name in made:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def outside(lines):
    """The estimates in a table that lie outside their interval, by more than the rounding of its numbers."""
    found, numbers = {}, lines.select_dtypes("number")
    for low in [name for name in numbers if name == "low" or name.endswith("_low")]:
        name = low.removesuffix("_low") if low != "low" else "recovered"
        if name in numbers:
            value, high = lines[name], lines[low.removesuffix("low") + "high"]
            found[name] = int(((value < lines[low] - 1.5e-6) | (value > high + 1.5e-6)).sum())
    return found


def test_no_estimate_lies_outside_its_interval():
    counted = 0
    for path in sorted(BENCHMARKS.glob("**/*.csv")):
        found = outside(pd.read_csv(path))
        counted += len(found)
        assert not any(found.values()), (path, found)
    assert counted > 500
    shifted = pd.DataFrame({"hm": [1.0, 2.0], "hm_low": [0.5, 2.1], "hm_high": [1.5, 2.2]})
    assert outside(shifted) == {"hm": 1}
