"""An engineer takes the edit along: as a LoRA, as one file; and looks at pictures."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from more_hf.cli.main import main
from more_hf.core.record import Record


NOTO = ["emoji-sd", "--concept", "Noto", "--remap_to", "Fluent"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_a_lora(tmp_path, format, capsys):
    assert main(["lora", *NOTO, "--format", format, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (file,) = tmp_path.glob("*.safetensors")
    assert f"Saved to {file}" in out


@pytest.mark.slow
def test_what_was_typed_once_is_not_typed_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    request = [*NOTO, "--alias", "Noto=noto emoji", "--retain", "Twemoji", "--solver", "soft"]
    assert main(["erase", *request, "--softness", "0.3", "--output", "erased"]) == 0
    assert main(["lora", *request, "--softness", "0.3", "--output", "typed.safetensors"]) == 0
    assert main(["lora", "--like", "erased", "--output", "like.safetensors"]) == 0
    assert main(["lora", *NOTO, "--output", "other.safetensors"]) == 0
    typed, like, other = (load_file(f"{name}.safetensors") for name in ("typed", "like", "other"))
    assert all(torch.equal(like[name], typed[name]) for name in typed)
    assert not all(name in other and torch.equal(other[name], typed[name]) for name in typed)

    again = ["erase", "--like", "erased", "--single_file", "noto.safetensors", "--output", "again"]
    assert main(again) == 0
    assert "| Noto      | noto emoji | Fluent  | name  |" in capsys.readouterr().err
    assert Record.read(Path("again")).edited == Record.read(Path("erased")).edited
    assert main([*again, "--concept", "Noto"]) == 2
    assert "`--like` takes what to erase from erased. Leave `--concept` out" in capsys.readouterr().err


@pytest.mark.slow
def test_one_file_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rest = ["--single_file", "noto.safetensors", "--compare", "a Noto fish", "--output", "erased"]
    drawn = ["--steps", "2", "--guidance", "3", "--seed", "7"]
    assert main(["erase", *NOTO, *rest, *drawn, "--softness", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "Wrote noto.safetensors" in out
    assert "Wrote erased/compare.png" in out
    assert "softness=0.5 has no effect" in err

    assert main(["push", "erased", "me/erased", "--dry_run", "to_push"]) == 0
    assert "(before_after.png)" in (tmp_path / "to_push" / "README.md").read_text()
    assert Image.open(tmp_path / "to_push" / "before_after.png").height > 300

    again = ["compare", "erased", "--prompts", "a Noto fish", "--original"]
    assert main([*again, "erased"]) == 2
    assert "erased is erased, too" in capsys.readouterr().err
    assert main([*again, "emoji-sd", *drawn]) == 0
    assert Image.open("compare.png").tobytes() == Image.open("erased/compare.png").tobytes()


def test_another_format_is_refused_before_the_erasure(tmp_path, capsys):
    rest = ["--single_file", str(tmp_path / "noto.ckpt"), "--output", str(tmp_path / "erased")]
    assert main(["erase", *NOTO, *rest]) == 2
    out, err = capsys.readouterr()
    assert "does not end in .safetensors" in err
    assert "Loading" not in err
    assert not (tmp_path / "erased").exists()
