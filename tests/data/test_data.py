import subprocess
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import more_hf
from more_hf.data import EMOJI_ARTISTS, FOLDER, load_emoji_sd, load_lpips
from more_hf.diffusion.prompts import everyday_prompts
from more_hf_bench.artists.prompts import read_prompts


ROOT = Path(__file__).parents[2]


def wave(size, phase):
    """Three planes of crossed waves in [-1, 1], in float64: the same picture on every machine."""
    y, x = torch.arange(size).double()[:, None], torch.arange(size).double()[None, :]
    planes = [torch.sin(0.11 * k * x + 0.07 * y + phase) * torch.cos(0.05 * k * y - phase) for k in (1, 2, 3)]
    return torch.stack(planes).unsqueeze(0).float()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "phase", "expected"),
    [(64, 0.0, 0.0), (64, 0.3, 0.027124), (64, 2.5, 0.101459), (256, 0.3, 0.058836), (256, 1.0, 0.240669)],
)
def test_lpips_has_the_values_of_the_published_weights(size, phase, expected):
    with torch.no_grad():
        measured = load_lpips()(wave(size, phase), wave(size, 0.0)).item()
    assert measured == pytest.approx(expected, abs=1e-4)


def test_load_lpips_is_quiet_and_leaves_the_random_state(capsys):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = load_lpips()
    assert capsys.readouterr() == ("", "")
    assert torch.equal(state, torch.get_rng_state())
    assert not metric.training
    assert not any(parameter.requires_grad for parameter in metric.parameters())


def test_load_emoji_sd_is_quiet_and_float32(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = more_hf.load_emoji_sd()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.safety_checker is None
    assert pipe.name_or_path == "emoji-sd"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_load_emoji_sd_takes_a_dtype(name):
    pipe = load_emoji_sd(**{name: torch.bfloat16})
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_plain_diffusers_generates_from_the_folder_with_no_dtype_given():
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER / "emoji_sd")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "pt"}
    styles = [f"a cat face in the style of {artist}" for artist in EMOJI_ARTISTS[:2]]
    noise = [torch.Generator().manual_seed(0) for _ in styles]
    images = pipe(styles, generator=noise, **options).images
    assert images.shape == (2, 3, 64, 64)
    assert images.isfinite().all()
    assert images[0].std() > 0.05  # something is drawn
    assert (images[0] - images[1]).abs().mean() > 0.01  # and the artist's name changes it


def test_notices_name_every_artist_and_licence():
    notice = (FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    table = [line for line in notice.splitlines() if line.startswith("| ")]
    for artist in EMOJI_ARTISTS:
        (line,) = [line for line in table if line.startswith(f"| {artist} |")]
        assert any(licence in line for licence in ("CC-BY-4.0", "Apache-2.0", "MIT"))
    assert "BSD 3-Clause" in (FOLDER / "lpips" / "LICENSE-torchvision.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_wheel_has_the_data_and_works_from_elsewhere(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    wheel = Path(next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    assert wheel.stat().st_size < 60e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"more_hf", "more_hf_bench"}
    tables = {f"more_hf_bench/prompts/{path.name}" for path in (ROOT / "prompts").glob("*.csv")}
    assert tables
    assert tables | {"more_hf/py.typed"} <= names
    for folder in (ROOT / "more_hf", ROOT / "benchmarks" / "more_hf_bench"):
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert {path.relative_to(folder.parent).as_posix() for path in files} <= names
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert licences == set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license-files"])

    code = (
        "import more_hf, more_hf.data; print(more_hf.__file__); import more_hf_bench.cli.bench; "
        "more_hf.data.load_lpips(); "
        "more_hf.load_emoji_sd(); print('loaded')"
    )
    # First on the path, so that an editable installation of the checkout does not answer.
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    location, loaded = done.stdout.split("\n")[:2]
    assert Path(location).is_relative_to(tmp_path)
    assert loaded == "loaded"


@pytest.mark.usefixtures("every_ordinary_prompt")
def test_everyday_prompts_are_the_list_that_the_tokenizer_knows(emoji_sd, tiny_sd):
    """The tiny tokenizer's words are of the general list, the embedded one's of its own captions."""
    own, general = everyday_prompts(emoji_sd.tokenizer), everyday_prompts(tiny_sd().tokenizer)
    for artist in EMOJI_ARTISTS:
        assert sum(artist in prompt for prompt in own) == 40
        assert not any(artist in prompt for prompt in general)
    assert len(general) > 300
    assert any("Rembrandt" in prompt for prompt in general)


@pytest.mark.usefixtures("every_ordinary_prompt")
def test_no_everyday_prompt_is_a_prompt_of_a_benchmark(emoji_sd, tiny_sd):
    ordinary = {*everyday_prompts(emoji_sd.tokenizer), *everyday_prompts(tiny_sd().tokenizer)}
    for name in ("emoji10", "emoji10_validation", "artists10"):
        measured = {row.prompt for row in read_prompts(name).rows}
        assert len(measured) > 100
        assert not ordinary & measured
