"""The README's code runs, its table is the committed one, and its picture is there."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

import more_hf
from more_hf.cli.main import parse


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_runs(block, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_sd().save_pretrained("CompVis/stable-diffusion-v1-4")  # where the block would read the Hub, it reads this folder

    names = {}
    exec(compile(block, "README.md", "exec"), names)

    saved = [path.parent for path in tmp_path.rglob("more_hf.json")]
    assert len(saved) == 1
    assert more_hf.verify(saved[0]).ok
    erased = names["pipe"] if "pipe" in names else names["model"]
    assert more_hf.get_erasure(erased).concepts in (["Blobmoji"], ["Van Gogh"], ["3"])


def test_every_command_is_one_that_the_command_line_knows():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "benchmarks").glob("*/README.md")]
    text = "\n".join(file.read_text("utf-8") for file in files).replace("\\\n", " ")
    commands = re.findall(r"^(?: {4})?(?:.* && )?more-hf (.*)$", text, re.MULTILINE)
    assert len(commands) > 20
    for command in commands:
        arguments = shlex.split(re.sub(r"\$\([^)]*\)", "1", command), comments=True)
        assert callable(parse(arguments).run)
    with pytest.raises(SystemExit):
        parse(["bench", "artist"])


def test_the_tables_are_the_committed_ones():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    for readme in script["READMES"]:
        text = readme.read_text("utf-8")
        assert script["filled"](text) == text
        assert text.count("<!-- table: ") == len(re.findall(r"-->\n\n\|", text)) > 0
        assert re.findall(r"^\|.*\n(?!\||$)", text, re.MULTILINE) == []  # without an empty line, what follows is one more row
    edited = README.replace("| lpips_f", "| lpips_x", 1)
    assert script["filled"](edited) == README != edited  # a table that was edited by hand is noticed


def test_links_and_pictures_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tests_that_the_readme_names_exist():
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", README)
    assert len(named) > 10
    for file, function in named:
        wanted = f"def {function}(" if function else "def test_"
        assert wanted in (ROOT / "tests" / file).read_text("utf-8"), (file, function)
