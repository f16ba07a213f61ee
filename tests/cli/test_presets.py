"""Every table of the paper is a packaged file of options, rehearsed from its first to its last line."""

import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from more_hf.cli.main import main, parse
from more_hf_bench.artists.config import ARTISTS
from more_hf_bench.artists.prompts import read_prompts
from more_hf_bench.classes.sources import HUB
from more_hf_bench.cli.artists import ArtistsOptions
from more_hf_bench.cli.classes import KDOptions
from more_hf_bench.cli.options import presets, read_options
from more_hf_bench.cli.rehearse import OF_CLASSES, check_filled, rehearse_artists, rehearse_classes
from more_hf_bench.columns import read_cells
from more_hf_bench.errors import BenchmarkError
from more_hf_bench.methods.registry import find_classification_method, find_diffusion_method
from more_hf_bench.run import refuse_unused_settings


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KINDS = {"artists": ArtistsOptions, "kd": KDOptions}
EVERY = [(bench, name) for bench in KINDS for name in presets(bench)]


def options_of(bench, *flags):
    args = parse(["bench", bench, *flags, "--output", "DIR"])
    return read_options(KINDS[bench], args, dict)


def run(monkeypatch, *command):
    """The command, which `config.json` reads off the process."""
    command = [str(part) for part in command]
    monkeypatch.setattr(sys, "argv", ["more-hf", *command])
    return main(command)


@pytest.mark.parametrize(("bench", "name"), EVERY)
def test_a_preset_names_methods_that_take_its_settings(bench, name):
    options = options_of(bench, "--preset", name)
    held = tomllib.loads(presets(bench)[name].read_text("utf-8"))
    assert {key: getattr(options, key) for key in held} == held
    if bench == "artists":
        functions = {method: find_diffusion_method(method) for method in options.methods}
        without = ("remap_to", "retain")
    else:
        forgets = "samples" if options.forget == "samples" else "classes"
        functions = {
            method: find_classification_method(method, forgets=forgets) for method in options.methods
        }
        without = ("splits", "seed", "fit")
    refuse_unused_settings(functions, {}, options.tuned or {}, without=without)
    # a flag takes precedence, as over any file
    assert options_of(bench, "--preset", name, "--seeds", "7").seeds == 7 if bench == "kd" else True


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("bench", "name"), EVERY)
def test_rehearsal(bench, name, tmp_path, monkeypatch):
    """On the first CUDA device where there is one."""
    assert run(monkeypatch, "bench", bench, "--preset", name, "--rehearse", "--output", tmp_path) == 0
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    if torch.cuda.is_available():
        assert config["runs"][0]["hardware"] == torch.cuda.get_device_name(0)
        costs = [line["peak_memory"] for line in read_cells(tmp_path / "summary.csv") if line["peak_memory"]]
        assert costs  # Figure 5: of the GPU
        assert min(map(float, costs)) > 0
    assert f"--preset {name} --rehearse" in config["runs"][0]["command"]
    assert list(config["methods"]) == options_of(bench, "--preset", name).methods


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "name"),
    [
        ("experts", "table1-cifar10"),
        ("target", "table1-cifar10"),
        ("routers --values 8", "table1-cifar10"),
        ("depth --values features.7 features.6", "table1-cifar10"),
        ("depth --values resnet.encoder.stages.3.layers.1", "table1-cifar100"),
    ],
)
def test_rehearsal_of_a_sweep(factor, name, tmp_path, monkeypatch):
    command = ["sweep.py", *factor.split(), "--preset", name, "--rehearse", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(BENCHMARKS / "kd" / "sweep.py"), run_name="__main__")
    assert f"--preset {name} --rehearse" in (tmp_path / "sweep.md").read_text("utf-8")


def test_the_page_has_every_table_and_the_counted_hours():
    page = (BENCHMARKS / "paper" / "README.md").read_text("utf-8")
    counted = (BENCHMARKS / "paper" / "cost.md").read_text("utf-8")
    hours = {
        cells[1].strip(): float(cells[3]) for line in counted.splitlines()[2:] if (cells := line.split("|"))
    }
    assert list(hours) == [name for _, name in EVERY]
    for bench, name in EVERY:
        assert f"more-hf bench {bench} --preset {name} " in page
        (shown,) = re.findall(rf"^\| `{name}` \|.*\| ([\d.]+) \|$", page, re.MULTILINE)
        assert float(shown) == pytest.approx(hours[name], abs=0.5)
    assert [int(n) for n in re.findall(r"^\| Table (\d+) \|", page, re.MULTILINE)] == list(range(1, 16))
    assert re.findall(r"^\| Figures? ([\d, ]+) \|", page, re.MULTILINE) == ["1", "3, 6", "4", "5", "7"]
    for name in re.findall(r"sweep.py \w+ --preset (\S+)", page):
        assert ("kd", name) in EVERY


def test_figure_4_is_its_prompt_and_the_artists_of_its_group():
    first, *others = read_prompts(str(BENCHMARKS / "paper" / "figure4.csv"), ARTISTS).rows
    assert (
        first.prompt
        == "A depiction of a starry night over a quiet town, reminiscent of Van Gogh's famous painting"
    )
    group = {row.artist for row in read_prompts("artists10", ARTISTS).rows if row.group == first.group}
    assert {row.artist for row in (first, *others)} == group
    assert all(row.thing in row.prompt for row in others)


def test_a_stand_in_has_the_form_of_what_it_stands_for(tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        rehearse_artists(options_of("artists", "--preset", "paper"), tmp_path).model
    )
    classes = (diffusers.StableDiffusionPipeline, transformers.CLIPTextModel, diffusers.UNet2DConditionModel)
    for part, kind in zip((pipe, pipe.text_encoder, pipe.unet), classes, strict=True):
        assert type(part) is kind

    for name, model_type in (("table1-cifar100", "resnet"), ("table1-imagenet", "vit")):
        options = rehearse_classes(options_of("kd", "--preset", name), tmp_path / name)
        model = transformers.AutoModelForImageClassification.from_pretrained(options.model)
        assert model.config.model_type == model_type
        source = HUB[options.dataset]
        files = sorted(path.name for path in (tmp_path / name).rglob("*.parquet"))
        assert files == sorted(f"{part}-00000-of-00001.parquet" for part in ("train", source.test))
    # ImageNet has more classes than ViT-B/16 has features, and so have their stand-ins
    assert model.config.num_labels == 20 > model.config.hidden_size
    with pytest.raises(BenchmarkError, match="no stand-in for the data set digits"):
        rehearse_classes(KDOptions(), tmp_path)


def test_an_empty_cell_is_found():
    line = {"method": "more", "forget": "4", **dict.fromkeys(OF_CLASSES, 1.0)}
    check_filled([line], ["more"], OF_CLASSES)
    with pytest.raises(BenchmarkError, match="left 1 cells of the table empty: more, 4: kr_hm_t"):
        check_filled([{**line, "kr_hm_t": None}], ["more"], OF_CLASSES)
    with pytest.raises(BenchmarkError, match=f"left {len(OF_CLASSES)} cells .* esc, 4: acc_f;"):
        check_filled([line], ["more", "esc"], OF_CLASSES)


def test_a_preset_is_one_file_of_options(capsys):
    assert main(["bench", "kd", "--preset", "table1-cifar", "--output", "DIR"]) == 2
    assert "table1-cifar10" in capsys.readouterr().err
    assert main(["bench", "kd", "--preset", "table4", "--config", "my.toml", "--output", "DIR"]) == 2
    assert "Give one of them" in capsys.readouterr().err
