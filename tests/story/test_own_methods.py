"""A researcher puts methods next to ours in all three benchmarks, edits one, and makes mistakes in others."""

import sys

import pandas as pd
import pytest

from more_hf.cli.main import main
from more_hf.data import FOLDER


FILE = """
import copy
import more_hf
import torch

def mine(pipe, concepts, *, remap_to, retain):
    return more_hf.erase_concept(pipe, concepts, remap_to=remap_to, solver="pinv")

def returns_nothing(pipe, concepts, *, remap_to, retain):
    more_hf.erase_concept(pipe, concepts, remap_to=remap_to)

def returns_a_part(pipe, concepts, *, remap_to, retain):
    return more_hf.erase_concept(pipe, concepts, remap_to=remap_to).unet

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
    "artists": ["--forget", "Noto", "--limit", "1", "--steps", "2"],
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
@pytest.mark.parametrize(
    ("kind", "method", "edit", "mistakes"),
    [
        (
            "artists",
            "mine",
            ("pinv", "covariance"),
            {
                "returns_nothing": "returned NoneType, not StableDiffusionPipeline",
                "returns_a_part": "returned UNet2DConditionModel, not StableDiffusionPipeline",
            },
        ),
        ("kd", "zeros", EDIT, {"raises": "'Splits' object has no attribute 'forgotten'"}),
        ("attacks", "zeros", EDIT, {"raises": "'Splits' object has no attribute 'forgotten'"}),
    ],
)
def test_methods_of_ones_own(bench, tmp_path, kind, method, edit, mistakes):
    assert bench(kind, method)[0] == 0
    status, said, before = bench(kind, method)
    assert status == 0
    assert "has changed" not in said

    # What is edited is measured again; what fails is named, with its traceback, and left out.
    (tmp_path / "my_methods.py").write_text(FILE.replace(*edit))
    status, said, after = bench(kind, method, *mistakes)
    assert status == 1
    assert f"my_methods:{method} has changed since it was measured: its earlier rows are replaced" in said
    assert not after.loc[[f"my_methods:{method}"]].equals(before.loc[[f"my_methods:{method}"]])
    assert after.loc[["original"]].equals(before.loc[["original"]])
    for mistake, message in mistakes.items():
        assert f"my_methods:{mistake} without" in said
        assert message in said
        assert f"my_methods:{mistake}" not in after.index
    assert "Traceback" in said
    assert f"everything else is measured and in {kind}/table.md" in said


@pytest.mark.slow
def test_a_method_that_changes_another_model(bench):
    assert "my_methods:changes_a_copy changed no weight of the model" in bench("kd", "changes_a_copy")[1]
