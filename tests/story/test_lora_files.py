"""An engineer takes what is erased in a folder along, as a LoRA and as one file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from more_hf.cli.main import main


NOTO = ["emoji-sd", "--concept", "Noto", "--remap_to", "Fluent"]


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
    again_edited, edited = (
        json.loads(Path(f"{name}/more_hf.json").read_text())["edited"] for name in ("again", "erased")
    )
    assert again_edited == edited
    assert main([*again, "--concept", "Noto"]) == 2
    assert "`--like` takes what to erase from erased. Leave `--concept` out" in capsys.readouterr().err
