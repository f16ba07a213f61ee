"""Somebody copies files and commands from the page of examples, as they are printed there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from more_hf.cli.main import main, parse
from more_hf.cli.request import read_request


PAGE = (Path(__file__).parents[2] / "examples" / "README.md").read_text("utf-8")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Write a file that the page shows, and return the command line below it that takes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the working directory

    def copy(file, word):
        block = re.search(rf"```\w+\n(# {re.escape(file)}\n.*?)```", PAGE, re.DOTALL)
        Path(file).write_text(block[1], "utf-8")
        (line,) = re.findall(rf"^    more-hf (.*{re.escape(word)}.*)$", PAGE, re.MULTILINE)
        return shlex.split(line)

    return copy


@pytest.mark.parametrize(
    ("file", "aliases", "reach"),
    [("artists.txt", [], None), ("artists.toml", ["blob emoji"], {"Blobmoji": "denoiser"})],
)
def test_a_list_of_artists(copied, file, aliases, reach):
    request = read_request(parse(copied(file, file)))
    assert request.concepts == {"Blobmoji": aliases, "Noto": [], "crab": []}
    targets = {"Blobmoji": ["Fluent"], "Noto": ["Fluent", "Twemoji"], "crab": ["fish"]}
    assert request.options["remap_to"] == targets
    assert request.options.get("reach") == reach


@pytest.mark.slow
def test_a_method(copied):
    argv = copied("my_method.py", "my_method:my_erase")
    assert main([*argv, "--limit", "1", "--steps", "1"]) == 0
    sys.modules.pop("my_method", None)
    assert "my_method:my_erase" in Path("DIR/table.md").read_text("utf-8")
