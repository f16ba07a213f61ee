import csv
import json
import re
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from support.compare import same, state
from support.rows import rows_of

import more_hf
from more_hf_bench.artists.grid import read_image
from more_hf_bench.artists.run import run_artists
from more_hf_bench.cli.report import benchmark_of
from more_hf_bench.errors import BenchmarkError
from more_hf_bench.methods.registry import find_diffusion_method


HEADER = "case_number,prompt,evaluation_seed,artist,thing,group\n"
PROMPTS = HEADER + (
    "3,a cat in the style of Van Gogh,11,Van Gogh,cat,one\n"
    "4,a <b>dog</b> by Van Gogh,12,Van Gogh,dog,one\n"
    "5,a house in the style of Claude Monet,13,Claude Monet,house,one\n"
    "6,a tree by Johannes Vermeer,14,Johannes Vermeer,tree,one\n"
    "7,a car by Picasso,15,Picasso,car,two\n"
    "8,a photo of a cat,16,,cat,\n"
)
EXPECTED_ROWS = 6 + 2  # and the second seed of the forgotten artist


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "few.csv"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


ASKED = {"forget": "Van Gogh", "remap_to": "Claude Monet", "steps": 3, "guidance": 5.0, "seeds": 2}


def run(pipe, prompts, output, methods=("original", "more"), **options):
    return run_artists(pipe, methods, prompts, output=output, **{**ASKED, "scheduler": "ddim", **options})


def rebuilt(folder):
    tables, config = benchmark_of(folder)
    return tables.write_outputs(folder, config)


def times(output):
    return {path: path.stat().st_mtime_ns for path in output.rglob("*.png") if path.parent != output}


# the run


def test_one_row_per_image_and_method(tiny_sd, prompts, tmp_path):
    pipe = tiny_sd()
    checker = torch.nn.Linear(1, 1)  # which cannot be called as one
    checker.dtype, checker.device = torch.float32, torch.device("cpu")
    pipe.register_modules(safety_checker=checker)
    scheduler, weights = pipe.scheduler, state(pipe.unet)
    summary = run(pipe, prompts, tmp_path / "out")
    assert pipe.scheduler is scheduler
    assert pipe.safety_checker is checker
    assert same(pipe.unet, weights)
    assert more_hf.get_erasure(pipe) is None

    rows = rows_of(tmp_path / "out")
    assert len(rows) == 2 * EXPECTED_ROWS
    by = {(row.method, row.case_number, row.sample): row for row in rows}
    assert len(by) == len(rows)
    assert by["more", 3, 1].evaluation_seed == 100_011
    assert all(row.lpips == 0 for row in rows if row.method == "original")
    assert by["more", 3, 0].lpips > 0
    assert by["more", 3, 0].retain == "Johannes Vermeer"  # the target is in the group, too
    assert {row.before for row in rows if row.method == "more"} == {
        row.after for row in rows if row.method == "original"
    }

    # the row's picture is what the library makes without the harness
    erased = tiny_sd()
    more_hf.erase_concept(erased, "Van Gogh", remap_to="Claude Monet", retain=["Johannes Vermeer"])
    erased.scheduler = DDIMScheduler.from_config(erased.scheduler.config)
    asked = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
    image = erased(
        "a cat in the style of Van Gogh", generator=torch.Generator().manual_seed(100_011), **asked
    ).images[0]
    kept = read_image(tmp_path / "out" / "images" / by["more", 3, 1].after).permute(1, 2, 0).numpy()
    assert np.abs(image * 255 - kept).max() < 1.5

    counted = [[line[name] for name in ("method", "n_f", "n_r", "n_none")] for line in summary]
    assert counted == [["original", 4, 3, 1], ["more", 4, 3, 1]]
    assert summary[1]["seconds_prepare"] > 0


@pytest.mark.slow
def test_what_is_there_is_not_made_again(tiny_sd, prompts, tmp_path):
    pipe, output = tiny_sd(), tmp_path / "out"
    run(pipe, prompts, output, "original", forget=["Van Gogh"])
    first = times(output)
    assert len(first) == EXPECTED_ROWS
    targets = {"Van Gogh": ["Claude Monet"], "Picasso": None}
    run(pipe, prompts, output, ["original", "more"], forget=["Van Gogh", "Picasso"], remap_to=targets)
    second = times(output)
    assert first.items() <= second.items()
    # one more before (Picasso's second seed), and an erasure of each artist; the original's pictures serve
    # both
    assert len(second) == EXPECTED_ROWS + 1 + EXPECTED_ROWS + (6 + 1)
    assert {(row.method, row.forget) for row in rows_of(output)} == {
        (method, artist) for method in ("original", "more") for artist in ("Van Gogh", "Picasso")
    }
    assert len(rows_of(output)) == 2 * (EXPECTED_ROWS + 7)

    # a picture without its JSON, half a picture and half a JSON do not count
    cells = output.rglob("cell.json")
    cell = next(path.parent for path in cells if json.loads(path.read_text())["forget"] == "Picasso")
    (cell / "5_0.json").unlink()
    (cell / "5_0.png").write_bytes(b"half")
    (cell / ".6_0.png.1.part").write_bytes(b"half")
    (cell / ".6_0.json.1.part").write_text('{"case_number": 6')
    rows = rows_of(output)
    lines = {(line["method"], line["forget"]): line for line in rebuilt(output)}
    assert lines["more", "Picasso"]["n_r"] == 3
    run(pipe, prompts, output, "more", forget="Picasso", remap_to=None)
    third = times(output)
    assert {path for path in third if third[path] != second[path]} == {cell / "5_0.png"}
    # A picture made again alone is the same up to rounding.
    measured = ("seconds", "lpips", "lpips_64", "lpips_64_rece")
    for row, again in zip(rows, rows_of(output), strict=True):
        same = [str(value) for name, value in row._asdict().items() if name not in measured]
        assert same == [str(value) for name, value in again._asdict().items() if name not in measured]
        assert row.lpips == pytest.approx(again.lpips, abs=1e-3)


def test_another_configuration_is_refused(tiny_sd, prompts, tmp_path):
    output = tmp_path / "out"
    run(tiny_sd(), prompts, output, "original")
    with pytest.raises(BenchmarkError, match=r"weights is"):
        run(tiny_sd(seed=1), prompts, output, "original")
    refused = (
        ("original", {"steps": 4}, r"steps is 3 there, 4 here"),
        ("more", {"remap_to": "Picasso"}, r"remap_to is \['Claude Monet'\] there, \['Picasso'\] here"),
        ("mere", {}, r"no method 'mere'"),
        ("more", {"forget": "Rembrandt"}, r"no prompts of 'Rembrandt'"),
        ("more", {"remap_to": {"Picasso": ["Claude Monet"]}}, r"no target for 'Van Gogh'"),
        ("more", {"settings": {"temperature": 1}}, r"takes `temperature`"),
    )
    for method, options, message in refused:
        with pytest.raises(BenchmarkError, match=message):
            run(tiny_sd(), prompts, output, method, **options)


def test_a_method_of_ones_own_gets_its_own_denoiser(tiny_sd, prompts, tmp_path):
    pipe, seen = tiny_sd(), {}

    def noise(pipe, concepts, *, remap_to, retain, scale=0.5):
        seen.update(concepts=concepts, remap_to=remap_to, retain=retain, scale=scale)
        for parameter in pipe.unet.parameters():
            parameter.data += scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return pipe

    lines = run(pipe, prompts, tmp_path / "out", {"noise": noise}, retain=["a dog"], settings={"scale": 0.25})
    told = {"concepts": ["Van Gogh"], "remap_to": ["Claude Monet"], "retain": ["a dog"], "scale": 0.25}
    assert seen == told
    assert lines[0]["lpips_r"] > 0
    again = run(pipe, prompts, tmp_path / "again", "original")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert configs[0]["generation"]["weights"] == configs[1]["generation"]["weights"]
    assert again[0]["lpips_r"] == 0


# outputs


@pytest.mark.slow
def test_the_outputs(tiny_sd, prompts, tmp_path):
    output = tmp_path / "out"

    def gentle(pipe, concepts, *, remap_to, retain):
        return pipe

    original = find_diffusion_method("original")
    methods = {"original": original, "more": more_hf.erase_concept, "gentle": gentle}
    summary = run(tiny_sd(), prompts, output, methods)
    assert {path.name for path in output.iterdir()} == {
        "config.json", "rows.csv", "summary.csv", "table.md", "report.html", "grid.webp",
        "methods.webp", "images",
    }  # fmt: skip
    table = (output / "table.md").read_text(encoding="utf-8")
    assert "Van Gogh lpips_64_rece_f ↑" in table  # the field's resize, since these are not 64 pixels wide
    assert "Van Gogh lpips_64_rece_r ↓" in table
    more = next(line for line in table.splitlines() if line.startswith("| more"))
    gentle = next(line for line in table.splitlines() if line.startswith("| gentle"))
    assert f"**{summary[1]['lpips_64_rece_f']:.3f}** [" in more
    assert "**0.000** [0.000, 0.000]" in gentle  # the best of what stays
    assert "**" not in next(line for line in table.splitlines() if line.startswith("| original"))
    for name in ("grid.webp", "methods.webp"):
        Image.open(output / name).verify()

    page = (output / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/webp;base64,[A-Za-z0-9+/=]{40,}"', page)) == 1
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r'src="[^"]*"', "", page))

    # without the pictures the tables are made again from the rows, the same
    before = {name: (output / name).read_bytes() for name in ("rows.csv", "summary.csv", "table.md")}
    for name in ("summary.csv", "table.md"):
        (output / name).unlink()
    (output / "images").rename(tmp_path / "elsewhere")
    assert rebuilt(output) == summary
    assert {name: (output / name).read_bytes() for name in before} == before
    with pytest.raises(BenchmarkError, match=r"no config\.json"):
        rebuilt(tmp_path)


OWN = """
import more_hf
from helper_of_mine import TARGET

def mine(pipe, concepts, *, remap_to, retain):
    next(pipe.text_encoder.parameters()).data *= 1.01  # its own, too
    return more_hf.erase_concept(pipe, concepts, remap_to=TARGET)

def nothing(pipe, concepts, *, remap_to, retain):
    more_hf.erase_concept(pipe, concepts, remap_to=remap_to)

def broken(pipe, concepts, *, remap_to, retain):
    raise KeyError("a bug of mine")
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "method_of_mine.py").write_text(OWN)
    (tmp_path / "helper_of_mine.py").write_text('TARGET = "Claude Monet"')
    yield tmp_path
    for name in ("method_of_mine", "helper_of_mine"):
        sys.modules.pop(name, None)


def lpips_of(output, method):
    with open(output / "rows.csv", newline="", encoding="utf-8") as file:
        return [row["lpips"] for row in csv.DictReader(file) if row["method"] == method]


@pytest.mark.slow
def test_a_changed_method_is_measured_again(tiny_sd, prompts, own_module, caplog):
    output, names = own_module / "out", ("original", "method_of_mine:mine")
    pipe = tiny_sd()
    before = next(pipe.text_encoder.parameters()).clone()
    run(pipe, prompts, output, names, seeds=1)
    assert torch.equal(next(pipe.text_encoder.parameters()), before)
    first = lpips_of(output, names[1])
    assert first
    caplog.clear()
    run(pipe, prompts, output, names, seeds=1)
    assert "changed since" not in caplog.text
    (own_module / "helper_of_mine.py").write_text('TARGET = "a dog"')
    for name in ("method_of_mine", "helper_of_mine"):
        sys.modules.pop(name)
    run(pipe, prompts, output, names, seeds=1)
    assert "method_of_mine:mine has changed since it was measured" in caplog.text
    second = lpips_of(output, names[1])
    assert len(first) == len(second)
    assert first != second


def test_a_method_that_fails_is_named_and_the_others_go_on(tiny_sd, prompts, own_module, caplog):
    output = own_module / "out"
    names = ("original", "method_of_mine:broken", "method_of_mine:nothing", "more")
    with pytest.raises(BenchmarkError, match="broken without Van Gogh, method_of_mine:nothing without"):
        run(tiny_sd(), prompts, output, names, seeds=1)
    assert "KeyError: 'a bug of mine'" in caplog.text
    assert 'raise KeyError("a bug of mine")' in caplog.text  # the traceback
    assert "nothing returned NoneType, not" in caplog.text
    assert lpips_of(output, "more")
    assert not lpips_of(output, names[1])
