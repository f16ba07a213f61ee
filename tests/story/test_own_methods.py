"""A researcher puts a method next to ours, edits it, and makes a mistake in it."""

import sys

import pytest

from more_hf.cli.main import main


METHOD = """
import more_hf

def mine(pipe, concepts, *, remap_to, retain):
    return more_hf.erase_concept(pipe, concepts, remap_to=remap_to, solver="pinv")

def mistaken(pipe, concepts, *, remap_to, retain):
    more_hf.erase_concept(pipe, concepts, remap_to=remap_to)
"""


@pytest.mark.slow
def test_a_method_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "method_in_a_story.py"
    file.write_text(METHOD)

    def bench(*functions):
        sys.modules.pop(file.stem, None)  # each command is a process of its own
        methods = ",".join(["original", *(f"{file.stem}:{name}" for name in functions)])
        argv = ["bench", "artists", "--methods", methods, "--forget", "Noto", "--limit", "1"]
        status = main([*argv, "--steps", "2", "--output", "table"])
        return status, capsys.readouterr().err

    assert bench("mine")[0] == 0
    assert "has changed" not in bench("mine")[1]
    file.write_text(METHOD.replace("pinv", "covariance"))
    status, said = bench("mine", "mistaken")
    assert "method_in_a_story:mine has changed since it was measured" in said
    assert "mistaken returned None, not a model" in said
    assert status == 2
    assert f"{file.stem}:mine" in (tmp_path / "table" / "table.md").read_text()
