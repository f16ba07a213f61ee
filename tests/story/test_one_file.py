"""An engineer wants one file for ComfyUI, and looks at pictures before and after."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from more_hf.cli.main import main
from more_hf.core.record import RECORD


NOTO = ["emoji-sd", "--concept", "Noto", "--remap_to", "Fluent"]


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
    saved = load_file("erased/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    written = load_file("noto.safetensors")["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(written, saved.half())
    assert main(["verify", "erased"]) == 0

    assert main(["push", "erased", "me/erased", "--dry_run", "to_push"]) == 0
    assert "(before_after.png)" in (tmp_path / "to_push" / "README.md").read_text()
    assert Image.open(tmp_path / "to_push" / "before_after.png").height > 300

    again = ["compare", "erased", "--prompts", "a Noto fish", *drawn]
    assert main([*again, "--original", "erased"]) == 2
    assert "erased is erased, too" in capsys.readouterr().err
    before = Image.open("erased/compare.png")
    for original in (["--original", "emoji-sd"], []):  # which the record names
        assert main([*again, *original, "--output", "new/grid.png"]) == 0
        assert Image.open("new/grid.png").tobytes() == before.tobytes()
    record = json.loads(Path("erased", RECORD).read_text("utf-8"))
    record["facts"]["base"] = "elsewhere"
    Path("erased", RECORD).write_text(json.dumps(record), "utf-8")
    assert main(again) == 0
    assert Image.open("compare.png").height < before.height - 200  # after alone
    assert "Open compare.png" in capsys.readouterr().out


def test_another_format_is_refused_before_the_erasure(tmp_path, capsys):
    rest = ["--single_file", str(tmp_path / "noto.ckpt"), "--output", str(tmp_path / "erased")]
    assert main(["erase", *NOTO, *rest]) == 2
    out, err = capsys.readouterr()
    assert "does not end in .safetensors" in err
    assert "Loading" not in err
    assert not (tmp_path / "erased").exists()
