"""A publisher erases a list: TOML, one command, what is said, a check, a card."""

import pytest

from more_hf.cli.main import main


LIST = """
remap_to = "Fluent"
retain = ["dog"]

[concepts]
Blobmoji = { aliases = ["blob emoji"] }
Noto = {}
"High Contrast" = {}
Streamline = "EmojiTwo"
crab = "fish"
pizza = "lemon"
guitar = "bell"
sunflower = "hibiscus"
"cat face" = "fox"
ambulance = "bus"
"gem stone" = "crown"
rocket = "none"
"""


@pytest.mark.slow
def test_a_list_of_twelve(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twelve.toml").write_text(LIST)
    argv = ["erase", "emoji-sd", "--concepts_file", "twelve.toml"]
    assert main([*argv, "--output", "erased12"]) == 0
    out, err = capsys.readouterr()
    assert "| Blobmoji      | blob emoji | Fluent" in err
    assert "'EmojiTwo' is in no caption" in err
    assert "most of the way" in " ".join(out.split())

    assert main(["verify", "erased12"]) == 0
    for answer in (0, 2):  # the second time, the folder is not empty
        assert main(["push", "erased12", "me/erased12", "--dry_run", "to_push"]) == answer
    assert "Choose another folder for the dry run" in capsys.readouterr().err.splitlines()[-1]
    card = (tmp_path / "to_push" / "README.md").read_text()
    assert "To rounding, in every layer that reads the prompt" not in card.replace("without a target", "")
    assert "are moved most of the way" in card


def test_a_list_in_another_format_is_refused(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("Noto -> Fluent\nBlobmoji => Fluent\n")
    file, output = str(tmp_path / "list.txt"), str(tmp_path / "out")
    assert main(["erase", "emoji-sd", "--concepts_file", file, "--output", output]) == 2
    assert "line 2: 'Blobmoji => Fluent'" in capsys.readouterr().err
