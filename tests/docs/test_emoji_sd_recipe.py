"""The recipe of the embedded pipeline, tiny, and a killed run that ends like one never killed."""

import itertools
import json
import random
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import more_hf.data
from more_hf_bench.columns import read_cells


pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "benchmarks" / "emoji_sd"
DATA = Path(more_hf.data.__file__).parent
THINGS = {"red-circle": "circle", "blue-square": "square", "green-bar": "bar"}
UNNAMED = {"grey-ring": "ring"}  # drawn by all, but not in things.txt


def command(script: str, smoke: bool = True, **flags) -> list[str]:
    """The script with these flags."""
    pairs = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [str(RECIPE / f"{script}.py"), *pairs, *["--smoke"] * smoke]


def run(script: str, **flags) -> None:
    """Run a script in this process, which has imported everything already."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(sys, "argv", command(script, **flags))
        patch.syspath_prepend(RECIPE)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            torch.set_num_threads(threads)


def write_packages(folder: Path) -> None:
    """Ten sets of four drawings, laid out like the npm packages; each artist has a shade of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPE)
        from data import ARTISTS
    for i, package in enumerate(ARTISTS.values()):
        colour = f"rgb({25 * i},{200 - 20 * i},90)"
        bodies = {
            "red-circle": f'<circle cx="8" cy="8" r="{4 + i / 3}" fill="{colour}"/>',
            "blue-square": f'<rect x="2" y="2" width="12" height="12" rx="{i / 2}" fill="{colour}"/>',
            "green-bar": f'<rect x="6" y="1" width="{3 + i / 4}" height="14" fill="{colour}"/>',
            "grey-ring": f'<circle cx="8" cy="8" r="5" stroke="{colour}" fill="none"/>',
        }
        icons = {"width": 16, "height": 16, "icons": {name: {"body": body} for name, body in bodies.items()}}
        info = {"name": package, "author": {"name": "A. Nobody"}, "license": {"spdx": "CC0-1.0"}}
        place = folder / "@iconify-json" / package
        place.mkdir(parents=True)
        (place / "icons.json").write_text(json.dumps(icons))
        (place / "info.json").write_text(json.dumps(info))
        (place / "package.json").write_text(json.dumps({"version": "1.0.0"}))
    shorts = THINGS | UNNAMED
    codes = {name: str(i) for i, name in enumerate(shorts, start=1)}
    names = folder / "emojibase-data" / "en" / "shortcodes"
    names.mkdir(parents=True)
    entries = [{"label": name.replace("-", " "), "hexcode": code, "tags": []} for name, code in codes.items()]
    (names.parent / "data.json").write_text(json.dumps(entries))
    spoken = json.dumps({codes[name]: short for name, short in shorts.items()})
    for source in ("github", "iamcal", "joypixels", "emojibase"):
        (names / f"{source}.json").write_text(spoken)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """data, VAE and text encoder in a folder, made by the scripts' smoke modes."""
    folder = tmp_path_factory.mktemp("recipe")
    write_packages(folder / "node_modules")
    (folder / "things.txt").write_text("\n".join(THINGS))
    places = {"node_modules": "node_modules", "output": "data", "things": "things.txt"}
    places = {flag: folder / place for flag, place in places.items()}
    # smoke would leave out what is not in things.txt
    run("data", smoke=False, attribution=folder / "ATTRIBUTION.md", **places)
    run("train_vae", data=folder / "data", output=folder / "vae", steps=10)
    run("train_text", data=folder / "data", output=folder / "text", steps=10)
    run("train_denoiser", output=folder / "denoiser", others=0.25, steps=10, **parts(folder))
    return folder


def parts(chain: Path) -> dict:
    return {"data": chain / "data", "vae": chain / "vae" / "vae", "text": chain / "text", "threads": 1}


@pytest.fixture
def recipe(monkeypatch):
    """Imports the recipe's scripts by their names."""
    monkeypatch.syspath_prepend(RECIPE)


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

    measured = {"data": chain / "data", "model": chain / "emoji_sd"}
    run("evaluate", output=chain / "evaluation", **measured)
    lines = read_cells(chain / "evaluation" / "summary.csv")
    assert {"training", "held_out"} == {line["group"] for line in lines}
    assert all(0 <= float(line["artist_acc"]) <= 100 for line in lines)
    assert (chain / "evaluation" / "grid.webp").stat().st_size > 0
    words = read_cells(chain / "evaluation" / "words.csv")
    of_all = {(line["level"], line["split"]): line["n"] for line in words if line["artist"] == "all"}
    levels = itertools.product(("variant", "short", "long"), ("trained", "held_out"))
    assert of_all == dict.fromkeys([("name", "trained"), *levels], "20")  # ten artists, two things


def test_curves_are_drawn_from_a_log(chain, recipe):
    from curves import draw

    with Image.open(draw(chain / "denoiser" / "log.csv")) as drawn:
        assert len(drawn.convert("L").getcolors(256)) > 2  # lines on paper


def test_killed_run_resumes_to_the_same_weights(chain):
    flags = {**parts(chain), "steps": 20, "start": chain / "denoiser" / "unet"}
    run("train_denoiser", output=chain / "whole", **flags)

    flags["save_seconds"] = 0
    killed = [sys.executable, *command("train_denoiser", output=chain / "killed", **flags)]
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = chain / "killed" / "log.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.01)  # a log line every five steps: kill it in the middle
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = torch.load(chain / "killed" / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < stopped_at < 20
    run("train_denoiser", output=chain / "killed", **flags)

    whole, killed = (torch.load(chain / f / "checkpoint.pt", weights_only=True) for f in ("whole", "killed"))
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            torch.testing.assert_close(killed[part][name], value, rtol=0, atol=0)
    logs = (read_cells(chain / folder / "log.csv") for folder in ("whole", "killed"))
    one, other = ([[r["step"], r["learning_rate"], r["loss"]] for r in log] for log in logs)
    assert one == other


def test_others_are_shown_under_their_artists_name_alone(chain, recipe):
    from dataset import draw_caption, load_dataset

    data, rng = load_dataset(chain / "data"), random.Random(0)
    assert (~data.chosen).sum() == 10
    drawn = [draw_caption(data, 1, -1, rng) for _ in range(400)]
    assert "" in {caption.text for caption in drawn}
    assert all(caption.thing is None for caption in drawn)
    assert not any(thing in caption.text for caption in drawn for thing in data.things)
    words = data.artist_words[1]
    assert {words.name, *words.variant} < {caption.artist for caption in drawn}


def test_captions_say_what_they_record_and_nothing_held_out(chain, recipe):
    """Words that a caption records stand in it, and no wording that is held out is ever drawn whole."""
    from dataset import draw_caption, load_dataset

    described = json.loads((DATA / "emoji_descriptions.json").read_text())["artists"]
    data, rng = load_dataset(chain / "data"), random.Random(0)
    drawn = [draw_caption(data, a, t, rng) for a in range(10) for t in range(3) for _ in range(200)]
    for caption in drawn:
        assert all(words in caption.text for words in (caption.artist, caption.thing) if words is not None)
    texts = "\n".join(caption.text for caption in drawn)
    for artist, kinds in described.items():
        for words in kinds.values():
            assert not any(wording in texts for wording in words["held_out"]), artist
            assert any(wording in texts for wording in words["trained"]), artist


def test_compiled_leaves_upsampling_out(recipe, monkeypatch):
    """The backend that is compiled for never sees an interpolation; compiled the usual way it does."""
    from train_vae import build_vae
    from training import compiled

    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def interpolations(compile_decoder) -> int:
        seen.clear()
        torch._dynamo.reset()
        latents = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
        vae = build_vae(smoke=True)
        torch.testing.assert_close(compile_decoder(vae)(latents).sample, vae.decode(latents).sample)
        assert any("conv2d" in target for target in seen)
        return sum("interpolate" in target for target in seen)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    assert interpolations(lambda vae: torch.compile(vae.decode)) == 3
    assert interpolations(lambda vae: compiled(vae, vae.decode)[0]) == 0
