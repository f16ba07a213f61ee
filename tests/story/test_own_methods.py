"""A researcher puts methods for classifiers next to ours, edits one, and makes mistakes in others."""

import sys

import pandas as pd
import pytest

from more_hf.cli.main import main
from more_hf.data import FOLDER


FILE = """
import copy
import torch

@torch.no_grad()
def zeros(model, splits, *, seed):
    model.classifier.weight[list(splits.classes)] *= 0
    return model

def raises(model, splits, *, seed):
    return splits.forgotten

def changes_a_copy(model, splits, *, seed):
    zeros(copy.deepcopy(model), splits, seed=seed)
    return model
"""
EDIT = ("model.classifier.weight[list(splits.classes)] *= 0", "next(model.parameters()).mul_(-1)")
DIGITS = ["--forget", "3", "--epochs", "0", "--model"]
BENCHES = {
    "kd": [*DIGITS, str(FOLDER / "classifiers" / "digits-allcnn")],
    "attacks": [*DIGITS, "digits-allcnn", "--attacks", "queries"],
}


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run one of the benchmarks on functions of `my_methods.py` in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the working directory
    (tmp_path / "my_methods.py").write_text(FILE)

    def run(kind, *functions):
        sys.modules.pop("my_methods", None)  # each command is a process of its own
        methods = ",".join(["original", *(f"my_methods:{name}" for name in functions)])
        status = main(["bench", kind, "--methods", methods, *BENCHES[kind], "--output", kind])
        rows = pd.read_csv(f"{kind}/rows.csv").set_index("method")
        return status, capsys.readouterr().err, rows

    yield run
    sys.modules.pop("my_methods", None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kd", "attacks"])
def test_methods_of_ones_own(bench, tmp_path, kind):
    assert bench(kind, "zeros")[0] == 0
    status, said, before = bench(kind, "zeros")
    assert status == 0
    assert "has changed" not in said

    # What is edited is measured again; what fails is named, with its traceback, and left out.
    (tmp_path / "my_methods.py").write_text(FILE.replace(*EDIT))
    status, said, after = bench(kind, "zeros", "raises")
    assert status == 1
    assert "my_methods:zeros has changed since it was measured: its earlier rows are replaced" in said
    assert not after.loc[["my_methods:zeros"]].equals(before.loc[["my_methods:zeros"]])
    assert after.loc[["original"]].equals(before.loc[["original"]])
    assert "my_methods:raises without" in said
    assert "'Splits' object has no attribute 'forgotten'" in said
    assert "my_methods:raises" not in after.index
    assert "Traceback" in said
    assert f"everything else is measured and in {kind}/table.md" in said


@pytest.mark.slow
def test_a_method_that_changes_another_model(bench):
    assert "my_methods:changes_a_copy changed no weight of the model" in bench("kd", "changes_a_copy")[1]
