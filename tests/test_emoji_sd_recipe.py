"""The recipe of the embedded pipeline: the whole chain, tiny, and a killed run that ends like one never killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


RECIPE = Path(__file__).parents[1] / "benchmarks" / "emoji_sd"
THINGS = {"red-circle": "circle", "blue-square": "square", "green-bar": "bar"}


def command(script: str, **flags) -> list[str]:
    """The script's smoke mode with these flags."""
    pairs = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, str(RECIPE / f"{script}.py"), *pairs, "--smoke"]


def run(script: str, **flags) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command(script, **flags), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def write_packages(folder: Path) -> None:
    """Ten sets of three drawings laid out like the npm packages; each artist has its own shade and corner radius."""
    sys.path.insert(0, str(RECIPE))
    try:
        from data import ARTISTS
    finally:
        sys.path.remove(str(RECIPE))
    for i, package in enumerate(ARTISTS.values()):
        colour = f"rgb({25 * i},{200 - 20 * i},90)"
        bodies = {
            "red-circle": f'<circle cx="8" cy="8" r="{4 + i / 3}" fill="{colour}"/>',
            "blue-square": f'<rect x="2" y="2" width="12" height="12" rx="{i / 2}" fill="{colour}"/>',
            "green-bar": f'<rect x="6" y="1" width="{3 + i / 4}" height="14" fill="{colour}"/>',
        }
        icons = {"width": 16, "height": 16, "icons": {name: {"body": body} for name, body in bodies.items()}}
        info = {"name": package, "author": {"name": "A. Nobody"}, "license": {"spdx": "CC0-1.0"}}
        place = folder / "@iconify-json" / package
        place.mkdir(parents=True)
        (place / "icons.json").write_text(json.dumps(icons))
        (place / "info.json").write_text(json.dumps(info))
        (place / "package.json").write_text(json.dumps({"version": "1.0.0"}))
    codes = {"red-circle": "1", "blue-square": "2", "green-bar": "3"}
    names = folder / "emojibase-data" / "en" / "shortcodes"
    names.mkdir(parents=True)
    entries = [{"label": name.replace("-", " "), "hexcode": code, "tags": []} for name, code in codes.items()]
    (names.parent / "data.json").write_text(json.dumps(entries))
    for source in ("github", "iamcal", "joypixels", "emojibase"):
        (names / f"{source}.json").write_text(json.dumps({codes[name]: short for name, short in THINGS.items()}))


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """data, VAE and text encoder in a folder, made by the scripts' smoke modes."""
    folder = tmp_path_factory.mktemp("recipe")
    write_packages(folder / "node_modules")
    (folder / "things.txt").write_text("\n".join(THINGS))
    run(
        "data",
        node_modules=folder / "node_modules",
        output=folder / "data",
        things=folder / "things.txt",
        attribution=folder / "ATTRIBUTION.md",
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    tensors = {f"features.{i}.weight": torch.randn(s, generator=generator) * 0.05 for i, s in shapes.items()}
    tensors |= {f"features.{i}.bias": torch.zeros(s[0]) for i, s in shapes.items()}
    save_file(tensors, folder / "alexnet.safetensors")
    run("train_vae", data=folder / "data", output=folder / "vae", alexnet=folder / "alexnet.safetensors")
    run("train_text", data=folder / "data", output=folder / "text")
    run("train_denoiser", output=folder / "denoiser", **parts(folder))
    return folder


def parts(chain: Path) -> dict:
    return {"data": chain / "data", "vae": chain / "vae" / "vae", "text": chain / "text", "threads": 1}


def test_data_holds_out_a_pair_of_each_thing_and_attributes_every_set(chain):
    meta = json.loads((chain / "data" / "meta.json").read_text())
    assert sorted(thing for thing, _ in meta["held_out"]) == sorted(THINGS)
    assert meta["synonyms"] == {name: [short] for name, short in THINGS.items()}
    notice = (chain / "ATTRIBUTION.md").read_text()
    assert all(artist in notice for artist in meta["artists"])
    assert "CC0-1.0" in notice


def test_exported_folder_opens_in_plain_diffusers_and_is_measured(chain):
    from diffusers import DiffusionPipeline

    vae, text, denoiser = chain / "vae" / "vae", chain / "text", chain / "denoiser"
    run("export", vae=vae, text=text, denoiser=denoiser, output=chain / "emoji_sd")
    pipe = DiffusionPipeline.from_pretrained(chain / "emoji_sd", torch_dtype=torch.float32)
    images = pipe(["a circle in the style of Noto"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert (chain / "emoji_sd" / "tokenizer" / "merges.txt").exists()

    measured = {"data": chain / "data", "model": chain / "emoji_sd", "alexnet": chain / "alexnet.safetensors"}
    run("evaluate", output=chain / "evaluation", **measured)
    with open(chain / "evaluation" / "summary.csv") as file:
        lines = list(csv.DictReader(file))
    assert {"training", "held_out"} == {line["group"] for line in lines}
    assert all(0 <= float(line["artist_acc"]) <= 100 for line in lines)
    assert (chain / "evaluation" / "grid.png").stat().st_size > 0


def test_killed_run_resumes_to_the_same_weights(chain):
    flags = {**parts(chain), "steps": 30, "save_seconds": 0, "start": chain / "denoiser" / "unet"}
    run("train_denoiser", output=chain / "whole", **flags)

    killed = command("train_denoiser", output=chain / "killed", **flags)
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = chain / "killed" / "log.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.01)  # a log line every five steps: kill it in the middle
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = torch.load(chain / "killed" / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < stopped_at < 30
    run("train_denoiser", output=chain / "killed", **flags)

    whole, killed = (torch.load(chain / f / "checkpoint.pt", weights_only=True) for f in ("whole", "killed"))
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            torch.testing.assert_close(killed[part][name], value, rtol=0, atol=0)
    columns = ("step", "learning_rate", "loss")
    logs = [[[r[c] for c in columns] for r in csv.DictReader(open(chain / f / "log.csv"))] for f in ("whole", "killed")]
    assert logs[0] == logs[1]
