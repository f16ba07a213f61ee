"""The examples run as they are written, and do what they say."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file

import more_hf
from more_hf_bench.artists.judges import EmojiJudges


EXAMPLES = Path(__file__).parents[2] / "examples"
THINGS = ("rocket", "pizza", "house", "guitar", "crab", "bus", "fish", "crown")

# A process in which more_hf cannot be imported, as on a machine without it: plain diffusers, saved by numpy.
WITHOUT_MORE_HF = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "more_hf":
            raise ModuleNotFoundError("No module named 'more_hf'")

sys.meta_path.insert(0, Blocked())
try:
    import more_hf
except ModuleNotFoundError:
    pass
else:
    sys.exit("more_hf was importable")

import numpy, torch
from diffusers import DiffusionPipeline

folder, file, *prompts = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
settings = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "np"}
numpy.save(file, pipe(prompts, generator=generators, **settings).images)
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as `python FILE ARGUMENTS` does, and return what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_short_and_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    for script in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("space/*.py")]:
        assert script.relative_to(EXAMPLES.parent).as_posix() in readme
        assert len(script.read_text("utf-8").splitlines()) <= 120


@pytest.mark.slow
def test_erase_van_gogh(run, tmp_path):
    printed = run("erase_van_gogh.py", "--tiny", "--steps", 2, "--output", tmp_path / "erased")
    assert re.search(r"^forgotten +High Contrast$", printed, re.MULTILINE)
    assert more_hf.verify(tmp_path / "erased").ok
    assert (tmp_path / "erased" / "before_after.png").is_file()


@pytest.mark.slow
def test_tune(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tune, fewer_steps = more_hf.tune, {"num_inference_steps": 3, "guidance_scale": 4.0}
    monkeypatch.setattr(
        more_hf, "tune", lambda *args, **asked: tune(*args, **asked | {"sampling": fewer_steps})
    )
    printed = run("tune.py")
    assert "Recommended: 1, to " in printed
    assert more_hf.verify(tmp_path / "tuned" / "without_high_contrast").ok
    assert (tmp_path / "tuned" / "sheet.webp").is_file()


@pytest.mark.slow
def test_export_comfyui_lora(run, tmp_path):
    printed = run("export_comfyui_lora.py", "--tiny", "--output", tmp_path)
    assert float(re.search(r"erased pipeline: (\S+) of 1", printed)[1]) < 0.02
    tensors = load_file(tmp_path / "without_high_contrast.safetensors")
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(name.startswith("lora_unet_") for name in tensors)


@pytest.mark.slow
def test_push_unlearned_pipeline_opens_without_more_hf(run, tmp_path, emoji_sd):
    """Without more_hf, too, the judge recognises the style before and not after; the things stay."""
    folder = tmp_path / "to_push"
    printed = run("push_unlearned_pipeline.py", "--dry_run", folder)
    assert "Nothing was pushed" in printed
    assert more_hf.verify(folder).ok
    card = (folder / "README.md").read_text("utf-8")
    assert "![The same prompts and seeds before and after](before_after.png)" in card
    assert (folder / "before_after.png").is_file()

    prompts = [f"a {thing} in the style of High Contrast" for thing in THINGS]
    environment = {**os.environ, "PYTHONPATH": ""}
    argv = [sys.executable, "-c", WITHOUT_MORE_HF, str(folder), str(tmp_path / "after.npy"), *prompts]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    settings = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "np"}
    before = emoji_sd(prompts, generator=generators, **settings).images

    judges, recognised = EmojiJudges(), {}
    for name, images in (("before", before), ("after", numpy.load(tmp_path / "after.npy"))):
        pictures = (torch.tensor(images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)
        artists, contents = judges.judge(pictures, [SimpleNamespace(thing=thing) for thing in THINGS])
        recognised[name] = artists.count("High Contrast"), sum(contents)
    assert recognised["before"][0] >= 6
    assert recognised["after"][0] <= 1
    assert recognised["after"][1] >= 6


@pytest.mark.slow
def test_routed_experts(run, tmp_path):
    printed = run("routed_experts.py", "--steps", 2, "--output", tmp_path)
    assert "it draws the same: True" in printed
    assert "asking twice undoes random routing" in printed
    assert (tmp_path / "experts.png").is_file()


@pytest.mark.slow
def test_own_method(run, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    with pytest.raises(SystemExit) as end:
        run("own_method.py", "--limit", 1, "--output", tmp_path)
    assert end.value.code == 0
    summary = (tmp_path / "summary.csv").read_text("utf-8")
    assert "own_method:project_out" in summary
    assert "original" in summary


@pytest.mark.slow
def test_own_classifier(run, tmp_path):
    printed = run("own_classifier.py", "--output", tmp_path)
    forgotten = re.search(r"^\| 3 \(forgotten\) +\| +\d+ \| +(\S+) \| +(\S+) \|$", printed, re.MULTILINE)
    others = re.search(r"^\| the others, together +\| +\d+ \| +(\S+) \| +(\S+) \|$", printed, re.MULTILINE)
    assert float(forgotten[1]) > 80 > 5 > float(forgotten[2])
    assert float(others[2]) > float(others[1]) - 2 > 80
    assert more_hf.verify(tmp_path / "forgotten").ok

    again = ["--data", tmp_path / "images", "--model", tmp_path / "forgotten", "--forget", 5]
    with pytest.raises(more_hf.AlreadyErasedError):
        run("own_classifier.py", *again, "--output", tmp_path / "again")
