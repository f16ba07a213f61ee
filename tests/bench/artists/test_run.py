import csv
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import more_hf
from more_hf.bench.artists.prompts import PromptFileError, read_prompts, read_targets
from more_hf.bench.artists.run import resize_64, run_artists
from more_hf.bench.artists.store import BenchmarkError, read_image
from more_hf.bench.artists.summary import ROW_TYPES, Bootstrap, read_rows, summarise
from more_hf.bench.artists.tables import rebuild
from more_hf.bench.methods.registry import find_diffusion_method


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


def run(pipe, prompts, output, methods=("original", "more"), **options):
    defaults = {"forget": "Van Gogh", "remap_to": "Claude Monet", "steps": 3, "guidance": 5.0, "seeds": 2, "scheduler": "ddim"}
    return run_artists(pipe, methods, prompts, output=output, **{**defaults, **options})


def times(output):
    return {path.relative_to(output): path.stat().st_mtime_ns for path in output.rglob("*.png") if path.parent != output}


# prompts


def test_the_packaged_prompts():
    prompts = read_prompts("emoji10")
    assert prompts.artists == list(more_hf.data.EMOJI_ARTISTS)
    assert all(len(prompts.group_of(artist)) == 4 for artist in prompts.artists)
    assert len({row.evaluation_seed for row in prompts.rows}) == len(prompts.rows)
    assert read_prompts("artists10").artists[0] == "Van Gogh"
    assert set(read_targets("targets")) >= set(prompts.artists) | set(read_prompts("artists10").artists)
    for forget, targets in read_targets("targets").items():
        assert forget not in targets
    assert [row.case_number for row in prompts.limited(1)] == [row.case_number for row in prompts.rows[::20]]


def test_the_fields_own_files(tmp_path):
    path = tmp_path / "big_artist_prompts.csv"
    path.write_text('\ufeff,case_number,prompt,evaluation_seed,artist\n0,7,"a barn, by A",42,A\n1,8,a boat by B,43,B\n', encoding="utf-8")
    prompts = read_prompts(path)
    assert [(row.case_number, row.prompt, row.evaluation_seed, row.artist) for row in prompts.rows] == [
        (7, "a barn, by A", 42, "A"),
        (8, "a boat by B", 43, "B"),
    ]
    assert prompts.group_of("A") == ["B"]  # the field compares within one file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_number,prompt,artist\n1,a cat,A\n", r"line 1: no column 'evaluation_seed'"),
        (HEADER + "1,a cat,2,A,cat,g\n1,a dog,3,A,dog,g\n", r"line 3: case_number 1 is already on line 2"),
        (HEADER + "1,a cat,2.5,A,cat,g\n", r"line 2: evaluation_seed is '2.5'"),
        (HEADER + "1,a cat,-2,A,cat,g\n", r"line 2: evaluation_seed is '-2'"),
        (HEADER + "x,a cat,2,A,cat,g\n", r"line 2: case_number is 'x'"),
        (HEADER + "1,,2,A,cat,g\n", r"line 2: the prompt is empty"),
        (HEADER + "1,a cat,2,A\n", r"line 2: not as many cells"),
        (HEADER, r"has no rows"),
        ("", r"no column"),
    ],
    ids=["column", "twice", "seed", "negative", "case", "prompt", "cells", "rows", "nothing"],
)
def test_what_is_wrong_with_a_prompts_file_is_said_before_anything_is_made(tiny_sd, tmp_path, text, message):
    path = tmp_path / "wrong.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PromptFileError, match=rf"wrong\.csv.*{message}"):
        run(tiny_sd(), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_prompts_file_names_the_packaged_ones(tmp_path):
    with pytest.raises(PromptFileError, match="artists10, emoji10"):
        read_prompts(tmp_path / "nowhere.csv")


# the run


def test_one_row_per_image_and_method(tiny_sd, prompts, tmp_path):
    pipe = tiny_sd()
    checker = torch.nn.Linear(1, 1)  # which cannot be called as one
    checker.dtype, checker.device = torch.float32, torch.device("cpu")
    pipe.register_modules(safety_checker=checker)
    scheduler, weights = pipe.scheduler, {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    summary = run(pipe, prompts, tmp_path / "out")
    assert pipe.scheduler is scheduler
    assert pipe.safety_checker is checker
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())
    assert more_hf.get_erasure(pipe) is None

    rows = read_rows(tmp_path / "out" / "rows.csv")
    assert len(rows) == 2 * EXPECTED_ROWS
    by = {(row["method"], row["case_number"], row["sample"]): row for row in rows}
    assert len(by) == len(rows)
    assert by["more", 3, 1]["evaluation_seed"] == 100_011
    assert all(row["lpips"] == 0 for row in rows if row["method"] == "original")
    assert by["more", 3, 0]["lpips"] > 0
    assert by["more", 3, 0]["retain"] == "Johannes Vermeer"  # the target is in the group, too
    assert {row["before"] for row in rows if row["method"] == "more"} == {row["after"] for row in rows if row["method"] == "original"}

    # the row's picture is what the library makes without the harness
    erased = tiny_sd()
    more_hf.erase_concept(erased, "Van Gogh", remap_to="Claude Monet", retain=["Johannes Vermeer"])
    erased.scheduler = DDIMScheduler.from_config(erased.scheduler.config)
    asked = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
    image = erased("a cat in the style of Van Gogh", generator=torch.Generator().manual_seed(100_011), **asked).images[0]
    kept = read_image(tmp_path / "out" / "images" / by["more", 3, 1]["after"]).permute(1, 2, 0).numpy()
    assert np.abs(image * 255 - kept).max() < 1.5

    assert [(line["method"], line["forget"], line["n_f"], line["n_r"], line["n_none"]) for line in summary] == [
        ("original", "Van Gogh", 4, 3, 1),
        ("more", "Van Gogh", 4, 3, 1),
    ]
    assert summary[1]["seconds_prepare"] > 0


@pytest.mark.slow
def test_the_batch_size_changes_nothing(tiny_sd, prompts, tmp_path):
    run(tiny_sd(), prompts, tmp_path / "a", ("more",), batch_size=1, settings={"router": "random", "num_experts": 3})
    run(tiny_sd(), prompts, tmp_path / "b", ("more",), batch_size=5, settings={"router": "random", "num_experts": 3})
    for a, b in zip(read_rows(tmp_path / "a" / "rows.csv"), read_rows(tmp_path / "b" / "rows.csv"), strict=True):
        assert (a["case_number"], a["sample"], a["evaluation_seed"]) == (b["case_number"], b["sample"], b["evaluation_seed"])
        assert a["lpips"] == pytest.approx(b["lpips"], abs=1e-3)


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
    # one more before (Picasso's second seed), and an erasure of each artist; the original's pictures serve both
    assert len(second) == EXPECTED_ROWS + 1 + EXPECTED_ROWS + (6 + 1)
    assert {(row["method"], row["forget"]) for row in read_rows(output / "rows.csv")} == {
        (method, artist) for method in ("original", "more") for artist in ("Van Gogh", "Picasso")
    }
    assert len(read_rows(output / "rows.csv")) == 2 * (EXPECTED_ROWS + 7)

    # a picture without its JSON, half a picture and half a JSON do not count
    cell = next(path.parent for path in output.rglob("cell.json") if json.loads(path.read_text())["forget"] == "Picasso")
    (cell / "5_0.json").unlink()
    (cell / "5_0.png").write_bytes(b"half")
    (cell / ".6_0.png.1.part").write_bytes(b"half")
    (cell / ".6_0.json.1.part").write_text('{"case_number": 6')
    rows = read_rows(output / "rows.csv")
    assert sum(line["n_r"] for line in rebuild(output) if line["forget"] == "Picasso" and line["method"] == "more") == 3
    run(pipe, prompts, output, "more", forget="Picasso", remap_to=None)
    third = times(output)
    assert {path for path in third if third[path] != second[path]} == {(cell / "5_0.png").relative_to(output)}
    measured = ("seconds", "lpips", "lpips_64", "lpips_64_rece")  # a picture made again alone is the same up to rounding
    for row, again in zip(rows, read_rows(output / "rows.csv"), strict=True):
        assert {k: v for k, v in row.items() if k not in measured} == {k: v for k, v in again.items() if k not in measured}
        assert row["lpips"] == pytest.approx(again["lpips"], abs=1e-3)


def test_another_configuration_is_refused(tiny_sd, prompts, tmp_path):
    output = tmp_path / "out"
    run(tiny_sd(), prompts, output, "original")
    with pytest.raises(BenchmarkError, match=r"steps is 3 there, 4 here"):
        run(tiny_sd(), prompts, output, "original", steps=4)
    with pytest.raises(BenchmarkError, match=r"seeds is 2 there, 1 here"):
        run(tiny_sd(), prompts, output, "original", seeds=1)
    with pytest.raises(BenchmarkError, match=r"weights is"):
        run(tiny_sd(seed=1), prompts, output, "original")
    with pytest.raises(BenchmarkError, match=r"Van Gogh remap_to is \['Claude Monet'\] there, \['Picasso'\] here"):
        run(tiny_sd(), prompts, output, "more", remap_to="Picasso")
    with pytest.raises(BenchmarkError, match=r"no method 'mere'"):
        run(tiny_sd(), prompts, output, "mere")
    with pytest.raises(BenchmarkError, match=r"no prompts of 'Rembrandt'"):
        run(tiny_sd(), prompts, output, forget="Rembrandt")
    with pytest.raises(BenchmarkError, match=r"no target for 'Van Gogh'"):
        run(tiny_sd(), prompts, output, remap_to={"Picasso": ["Claude Monet"]})
    with pytest.raises(BenchmarkError, match=r"takes `temperature`"):
        run(tiny_sd(), prompts, output, settings={"temperature": 1})


def test_a_method_of_ones_own_gets_its_own_denoiser(tiny_sd, prompts, tmp_path):
    pipe, seen = tiny_sd(), {}

    def noise(pipe, concepts, *, remap_to, retain, scale=0.5):
        seen.update(concepts=concepts, remap_to=remap_to, retain=retain, scale=scale)
        for parameter in pipe.unet.parameters():
            parameter.data += scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return pipe

    lines = run(pipe, prompts, tmp_path / "out", {"noise": noise}, retain=["a dog"], settings={"scale": 0.25})
    assert seen == {"concepts": ["Van Gogh"], "remap_to": ["Claude Monet"], "retain": ["a dog"], "scale": 0.25}
    assert lines[0]["lpips_r"] > 0
    again = run(pipe, prompts, tmp_path / "again", "original")
    weights = [json.loads((tmp_path / name / "config.json").read_text())["generation"]["weights"] for name in ("out", "again")]
    assert weights[0] == weights[1]
    assert again[0]["lpips_r"] == 0


# measures


def test_resizes_of_512_pixels():
    from torch.nn.functional import interpolate

    image = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rece, uce = resize_64(image, antialias=False), resize_64(image, antialias=True)
    for small, antialias in ((rece, False), (uce, True)):
        wanted = interpolate(image.float(), size=(64, 64), mode="bilinear", antialias=antialias)
        assert (small.float() - wanted).abs().max() <= 0.5
    # by hand: without antialias a pixel is the mean of the four in the middle of its 8 x 8 square, with it of many more
    middle = image[0, :, 3:5, 3:5].float().mean((1, 2))
    assert (rece[0, :, 0, 0].float() - middle).abs().max() <= 0.5
    assert uce.float().std() < rece.float().std() / 2


def bootstrap_rows(values, artist="A"):
    return [{"artist": artist, "case_number": i, "value": value} for i, value in enumerate(values)]


def quantiles(rows, **options):
    mean, drawn = Bootstrap(rows, **options).mean(rows, lambda row: row["value"])
    return mean, *np.quantile(drawn, (0.025, 0.975))


def test_the_bootstrap_against_all_draws_by_hand():
    values = [0.0, 0.1, 0.5, 1.0]
    every = sorted(statistics.fmean(draw) for draw in itertools.product(values, repeat=4))
    mean, low, high = quantiles(bootstrap_rows(values), draws=40_000)
    assert mean == pytest.approx(0.4)
    assert low == pytest.approx(np.quantile(every, 0.025), abs=0.026)
    assert high == pytest.approx(np.quantile(every, 0.975), abs=0.026)
    # and against the normal approximation, where there are many
    rng = random.Random(0)
    many = [rng.gauss(0.3, 0.1) for _ in range(300)]
    mean, low, high = quantiles(bootstrap_rows(many))
    half = 1.96 * statistics.pstdev(many) / 300**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert quantiles(bootstrap_rows(many)) == (mean, low, high)


def test_seeds_of_one_prompt_are_drawn_together():
    rows = [{"artist": "A", "case_number": i, "value": float(i)} for i in (0, 1) for _ in range(50)]
    assert quantiles(rows) == (0.5, 0.0, 1.0)  # two prompts, however many images
    apart = [{"artist": artist, "case_number": i, "value": float(i)} for i, artist in enumerate("AB")]
    assert quantiles(apart) == (0.5, 0.5, 0.5)  # each artist keeps its one prompt


TEN_ROWS = """
case_number,sample,artist,group,lpips,style_before,style_after,content_before,content_after
1,0,A,one,0.4,A,B,1,1
1,1,A,one,0.6,A,A,1,0
2,0,A,one,0.5,A,B,1,1
2,1,A,one,0.7,C,B,0,0
3,0,B,one,0.1,B,B,1,1
4,0,C,one,0.2,C,A,1,1
5,0,D,two,0.3,D,D,1,0
6,0,D,two,0.1,B,D,0,1
7,0,,,0.05,B,B,1,1
8,0,,,0.15,B,B,1,0
"""


def ten_rows():
    rows = []
    for i, cells in enumerate(csv.DictReader(TEN_ROWS.split())):
        given = {"method": "m", "forget": "A", "remap_to": "B", "retain": "C; a dog", **cells}
        given.update(lpips_64=cells["lpips"], lpips_64_rece=cells["lpips"], seconds=str(i), seconds_prepare="3", peak_memory="100")
        rows.append({column: kind(given.get(column) or kind()) for column, kind in ROW_TYPES.items()})
    return rows


def test_the_summary_of_ten_rows_by_hand():
    (line,) = summarise(ten_rows(), confusion={"B": {"A": 12.0, "B": 88.0}, "A": {"A": 90.0, "B": 10.0}})
    by_hand = {
        "method": "m",
        "forget": "A",
        "n_f": 4,
        "n_r": 4,
        "n_none": 2,
        "lpips_f": 0.55,
        "lpips_f_low": 0.5,
        "lpips_f_high": 0.6,
        "lpips_r": 0.175,
        "lpips_d": 0.375,
        "lpips_r_group": 0.15,
        "lpips_named": 0.15,
        "lpips_named_low": 0.15,  # one prompt of each artist
        "lpips_unnamed": 0.2,
        "lpips_unnamed_low": 0.1,
        "lpips_unnamed_high": 0.3,
        "lpips_none": 0.1,
        "lpips_64_f": 0.55,
        "lpips_64_rece_d": 0.375,
        "style_f": 25.0,
        "style_f_before": 75.0,
        "style_f_change": -50.0,
        "style_r": 75.0,
        "style_r_before": 75.0,
        "style_r_change": 0.0,
        "style_r_change_low": -25.0,  # C always loses its one, D draws two of (0, +1)
        "style_r_change_high": 25.0,
        "content_f": 50.0,
        "content_f_before": 75.0,
        "content_r": 75.0,
        "content_r_before": 75.0,
        "content_none": 50.0,
        "content_none_before": 100.0,
        "style_f_real": 12.0,
        "seconds_prepare": 3.0,
        "seconds_per_image": 4.5,
        "peak_memory": 100.0,
    }
    assert {key: line[key] for key in by_hand} == pytest.approx(by_hand)


def test_erasures_are_pooled_over_prompts():
    other = [{**row, "forget": "D", "remap_to": "B", "retain": ""} for row in ten_rows()]
    lines = summarise([*ten_rows(), *other])
    assert [line["forget"] for line in lines] == ["A", "D", "all"]
    pooled = lines[-1]
    assert (pooled["n_f"], pooled["n_r"]) == (4 + 2, 4 + 6)
    assert pooled["lpips_f"] == pytest.approx((4 * 0.55 + 2 * 0.2) / 6)
    assert pooled["lpips_r"] == pytest.approx((4 * 0.175 + 4 * 0.55 + 0.1 + 0.2) / 10)
    assert pooled["style_f_real"] is None


# outputs


@pytest.mark.slow
def test_the_outputs(tiny_sd, prompts, tmp_path):
    output = tmp_path / "out"

    def gentle(pipe, concepts, *, remap_to, retain):
        return pipe

    summary = run(tiny_sd(), prompts, output, {"original": find_diffusion_method("original"), "more": more_hf.erase_concept, "gentle": gentle})
    assert {path.name for path in output.iterdir()} == {
        "config.json", "rows.csv", "summary.csv", "table.md", "report.html", "grid.png", "methods.png", "images",
    }  # fmt: skip
    table = (output / "table.md").read_text(encoding="utf-8")
    assert "Van Gogh lpips_64_rece_f ↑" in table  # the field's resize, since these are not 64 pixels wide
    assert "Van Gogh lpips_64_rece_r ↓" in table
    more = next(line for line in table.splitlines() if line.startswith("| more"))
    gentle = next(line for line in table.splitlines() if line.startswith("| gentle"))
    assert f"**{summary[1]['lpips_64_rece_f']:.3f}** [" in more
    assert "**0.000** [0.000, 0.000]" in gentle  # the best of what stays
    assert "**" not in next(line for line in table.splitlines() if line.startswith("| original"))
    for name in ("grid.png", "methods.png"):
        Image.open(output / name).verify()

    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == EXPECTED_ROWS * 3  # before, more, gentle
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{40,}"', page)) == EXPECTED_ROWS * 3
    assert "<b>dog</b>" not in page
    assert "&lt;b&gt;dog&lt;/b&gt;" in page
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r'src="[^"]*"', "", page))

    # without the pictures the tables are made again from the rows, the same
    before = {name: (output / name).read_bytes() for name in ("rows.csv", "summary.csv", "table.md")}
    for name in ("summary.csv", "table.md"):
        (output / name).unlink()
    (output / "images").rename(tmp_path / "elsewhere")
    assert rebuild(output) == summary
    assert {name: (output / name).read_bytes() for name in before} == before
    with pytest.raises(BenchmarkError, match=r"no config\.json"):
        rebuild(tmp_path)


PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images], input = new Event("input");
  const found = [images.filter(image => image.complete && image.naturalWidth > 0 && image.width > 0).length];
  const prompts = () => all.filter(row => !row.hidden).map(row => row.dataset.prompt);
  const set = (id, value) => { const box = document.getElementById(id); box.value = value; box.dispatchEvent(input); };
  set("artist", "forgotten"); found.push(prompts().length);
  set("text", "dog van"); found.push(prompts().length);
  set("artist", "none"); set("text", ""); found.push(prompts().length);
  set("artist", ""); set("method", "gentle");
  found.push([...document.querySelectorAll("td[data-method=more]")].filter(cell => cell.offsetWidth > 0).length);
  set("method", ""); set("sort", "more:d");
  const order = [...body.rows].map(row => lpips(row, "more"));
  found.push(order.every((x, i) => i === 0 || x <= order[i - 1]) && order[0] > order.at(-1));
  document.title = "found " + found.join(" ");
});
</script>"""


@pytest.mark.slow
# The check script installs the browser, and then a missing one fails; elsewhere `apt-get install chromium` adds this test.
@pytest.mark.skipif(not shutil.which("chromium") and "CI" not in os.environ, reason="no chromium here")
def test_the_page_in_a_browser(tiny_sd, prompts, tmp_path):
    run(tiny_sd(), prompts, tmp_path / "out", {"more": more_hf.erase_concept, "gentle": lambda pipe, concepts, *, remap_to, retain: pipe})
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", probed.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert re.search("<title>(.*)</title>", dom)[1] == f"found {EXPECTED_ROWS * 3} 4 2 1 0 true"
