"""Every method in one table: ours in its variants, several artists in one erasure, tuned settings."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.compare import same
from support.rows import frame, row, rows_of

import more_hf
from more_hf.cli.main import main
from more_hf_bench.artists import grid
from more_hf_bench.artists.prompts import read_targets
from more_hf_bench.artists.run import run_artists
from more_hf_bench.errors import BenchmarkError
from more_hf_bench.methods.registry import DIFFUSION


HEADER = "case_number,prompt,evaluation_seed,artist,thing,group\n"
PROMPTS = HEADER + (
    "3,a cat in the style of Van Gogh,11,Van Gogh,cat,one\n"
    "4,a house by Claude Monet,13,Claude Monet,house,one\n"
    "5,a tree by Johannes Vermeer,14,Johannes Vermeer,tree,one\n"
    "6,a car by Picasso,15,Picasso,car,two\n"
    "7,a dog by Andy Warhol,17,Andy Warhol,dog,two\n"
    "8,a photo of a cat,16,,cat,\n"
)
ASK = {"num_inference_steps": 2, "output_type": "latent", "prompt": ["a cat by van gogh", "a tree"]}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "few.csv"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


ASKED = {"forget": "Van Gogh", "remap_to": {"Van Gogh": ["Claude Monet"]}, "steps": 2, "guidance": 5.0}


def run(pipe, methods, prompts, output, **options):
    return run_artists(pipe, methods, prompts, output=output, **{**ASKED, "scheduler": "ddim", **options})


def latents(pipe):
    return pipe(**ASK, generator=torch.Generator().manual_seed(0)).images


# ours


@pytest.mark.slow
def test_reloaded_is_the_merged_pipeline_with_nothing_of_ours_attached(tiny_sd):
    told = {"remap_to": ["claude monet"], "retain": ["picasso"]}
    erased = more_hf.erase_concept(tiny_sd(), "van gogh", **told)
    pipe = tiny_sd()
    reloaded = DIFFUSION["more-reloaded"].load()(pipe, ["van gogh"], **told)
    assert reloaded is not pipe
    assert more_hf.get_erasure(reloaded) is None
    assert not reloaded.unet._forward_pre_hooks
    assert not [name for name in vars(reloaded.unet) if "more" in name]
    assert torch.equal(latents(reloaded), latents(erased))
    assert not torch.allclose(latents(reloaded), latents(tiny_sd()), atol=1e-3)


@pytest.mark.slow
def test_what_each_of_ours_is_told_and_does(tiny_sd, prompts, tmp_path):
    output, several = tmp_path / "out", ["Claude Monet", "Picasso"]
    ours = "more more-erase more-mean more-random more-hash more-without-po more-erase-without-po"
    methods = ours.split()
    run(tiny_sd(), methods, prompts, output, several={"Van Gogh": several})
    cells = [json.loads(path.read_text()) for path in output.rglob("cell.json")]
    targets = {cell["method"]: cell["remap_to"] for cell in cells}
    assert {name for name in methods if targets[name] is None} == {"more-erase", "more-erase-without-po"}
    assert {name for name in methods if targets[name] == several} == {"more-mean", "more-random", "more-hash"}
    assert {name for name in methods if targets[name] == ["Claude Monet"]} == {"more", "more-without-po"}
    routers = {cell["method"]: cell["settings"].get("router") for cell in cells}
    assert routers == {**dict.fromkeys(methods), "more-random": "random", "more-hash": "hash"}
    # everyone keeps the same two of the group of three: those that are no target are in `retain`
    retained = {cell["method"]: cell["retain"] for cell in cells}
    assert retained["more"] == retained["more-mean"] == ["Johannes Vermeer"]
    assert retained["more-erase"] == ["Claude Monet", "Johannes Vermeer"]
    rows = {(row.method, row.case_number): row for row in rows_of(output)}
    assert rows["more-mean", 3].remap_to == "Claude Monet; Picasso"
    assert rows["more-erase", 3].remap_to == "none"
    changes = [rows[name, 3].lpips for name in methods]
    assert min(changes) > 0
    assert len(set(changes)) == len(methods)  # no two of them do the same


def test_several_targets_must_be_declared(tiny_sd, prompts, tmp_path):
    several = {"Picasso": ["Claude Monet", "Andy Warhol"]}
    with pytest.raises(BenchmarkError, match=r"needs several targets, and there are none for 'Van Gogh'"):
        run(tiny_sd(), "more-mean", prompts, tmp_path / "out", several=several)
    assert not (tmp_path / "out").exists()
    one, several = read_targets("targets"), read_targets("targets_several")
    assert one.keys() == several.keys()
    for forget, names in several.items():
        assert len(set(names)) == 3
        assert names[0] == one[forget][0]
        assert not set(names) & set(forget.split("+"))


# several artists in one erasure


@pytest.mark.slow
def test_artists_erased_in_one_call(tiny_sd, prompts, tmp_path):
    output, joint = tmp_path / "out", "Van Gogh+Picasso"
    targets = {"Van Gogh": ["Claude Monet"], joint: ["Claude Monet"]}
    summary = run(
        tiny_sd(), ["more", "uce"], prompts, output, forget=["Van Gogh", joint], remap_to=targets, seeds=2
    )
    lines = {(line["method"], line["forget"]): line for line in summary}
    assert len(lines) == 4  # nothing is pooled
    for forget, counted in (("Van Gogh", [2, 4, 1]), (joint, [4, 3, 1])):
        assert [lines["more", forget][column] for column in ("n_f", "n_r", "n_none")] == counted
    rows = [row for row in rows_of(output) if row.method == "more" and row.forget == joint]
    assert {row.retain for row in rows} == {"Johannes Vermeer; Andy Warhol"}  # of both groups
    of_both_groups = [row.lpips for row in rows if row.case_number in (4, 5, 7)]
    assert lines["more", joint]["lpips_r_group"] == pytest.approx(sum(of_both_groups) / 3, abs=1e-6)

    # its pictures are what one call of the library gives for both names
    told = {"remap_to": ["Claude Monet"], "retain": ["Johannes Vermeer", "Andy Warhol"]}
    erased, seen = more_hf.erase_concept(tiny_sd(), ["Van Gogh", "Picasso"], **told), {}

    def spy(pipe, concepts, *, remap_to, retain):
        edited = more_hf.erase_concept(pipe, concepts, remap_to=remap_to, retain=retain)
        seen.update(edited.unet.state_dict())
        return edited

    run(tiny_sd(), {"spy": spy}, prompts, tmp_path / "spied", forget=joint, remap_to="Claude Monet")
    assert same(erased.unet, seen)
    with pytest.raises(BenchmarkError, match=r"no prompts of 'Rembrandt'"):
        run(tiny_sd(), "more", prompts, tmp_path / "no", forget="Van Gogh+Rembrandt")


# settings


@pytest.mark.slow
def test_tuned_settings_reach_their_method_and_are_kept(tiny_sd, prompts, tmp_path):
    output, tuned = tmp_path / "out", {"uce": {"lamb": 30.0}, "rece": {"lamb": 7.0}, "esd": {"iterations": 5}}
    run(tiny_sd(), ["uce", "cure"], prompts, output, tuned=tuned)
    methods = json.loads((output / "config.json").read_text())["methods"]
    assert methods["uce"]["lamb"] == 30.0
    assert methods["cure"] == {"alpha": 2.0, "tokens": "content"}
    run(tiny_sd(), "uce", prompts, tmp_path / "plain")
    plain = {row.case_number: row.lpips for row in rows_of(tmp_path / "plain")}
    kept = {row.case_number: row.lpips for row in rows_of(output) if row.method == "uce"}
    assert kept[3] != pytest.approx(plain[3], abs=1e-5)
    with pytest.raises(BenchmarkError, match=r"lamb is 30\.0 there, 0\.5 here"):
        run(tiny_sd(), "uce", prompts, output)
    with pytest.raises(BenchmarkError, match=r"cure takes no `lamb`"):
        run(tiny_sd(), "cure", prompts, tmp_path / "no", tuned={"cure": {"lamb": 1.0}})
    # What was typed goes first.
    run(tiny_sd(), "uce", prompts, tmp_path / "flag", tuned=tuned, settings={"lamb": 3.0})
    assert json.loads((tmp_path / "flag" / "config.json").read_text())["methods"]["uce"]["lamb"] == 3.0


def test_the_command_reads_its_file_and_joint_names(monkeypatch, tmp_path, emoji_sd, capsys):
    called = {}

    def fake(pipe, methods, prompts, forget, **options):
        called.update(options, methods=methods, forget=forget)
        return []

    monkeypatch.setattr("more_hf_bench.artists.run.run_artists", fake)
    monkeypatch.setattr("more_hf.load_emoji_sd", lambda dtype: copy.copy(emoji_sd))
    monkeypatch.setattr("more_hf_bench.artists.tables.short_markdown", lambda summary, kind: "")
    (tmp_path / "settings.json").write_text('{"uce": {"lamb": 20}}')
    file = tmp_path / "bench.toml"
    file.write_text('tuned = "settings.json"\nlimit = 3\nseeds = 2\n')
    command = "bench artists --methods training-free --forget twemoji+noto Blobmoji"
    words = [*command.split(), "--output", str(tmp_path / "out"), "--config", str(file)]
    assert main([*words, "--limit", "5"]) == 0
    assert (called["limit"], called["seeds"]) == (5, 2)  # a flag takes precedence
    assert called["forget"] == ["Twemoji+Noto", "Blobmoji"]
    assert called["tuned"] == {"uce": {"lamb": 20}}
    assert "uce" in called["methods"]
    assert "esd" not in called["methods"]
    assert called["several"]["Twemoji"][0] == called["remap_to"]["Twemoji"][0]
    for text, message in (
        ("limit =", "bench.toml cannot be read"),
        ('limit = "six"', "`limit` must be"),
        ("lamb = 20", "no option 'lamb'"),
    ):
        file.write_text(text)
        assert main(words) == 2
        assert message in capsys.readouterr().err


# pictures


@pytest.mark.slow
def test_methods_side_by_side(tiny_sd, prompts, tmp_path):
    def shaken(pipe, concepts, *, remap_to, retain):
        for parameter in pipe.unet.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return pipe

    output = tmp_path / "out"
    original = DIFFUSION["original"].load()
    run(tiny_sd(), {"original": original, "more": more_hf.erase_concept, "shaken": shaken}, prompts, output)
    first = next(row for row in rows_of(output) if row.method == "shaken")
    assert first.prompt == "a cat in the style of Van Gogh"
    sheet = Image.open(output / "methods.webp").convert("RGB")

    def shown(column):
        x = 4 + column * 132
        return np.array(sheet.crop((x, sheet.height - 132, x + 128, sheet.height - 4)), dtype=np.float32)

    def kept(name):
        picture = Image.open(output / "images" / name)
        return np.array(picture.resize((128, 128), Image.Resampling.BILINEAR), dtype=np.float32)

    before, after = kept(first.before), kept(first.after)
    assert np.abs(shown(0) - before).mean() < 5 < np.abs(shown(0) - after).mean()
    assert np.abs(shown(2) - after).mean() < 5 < np.abs(shown(2) - before).mean()


def test_many_methods_and_erasures_are_not_all_side_by_side(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    files = {"before": "a.png", "after": "a.png"}
    rows = [
        row(forget=name, artist=name, method=method, **files) for name in "xyz" for method in ("more", "uce")
    ]

    def height(most):
        monkeypatch.setattr(grid, "METHODS_MOST", most)
        grid.write_grids(tmp_path, tmp_path, frame(rows))
        return Image.open(tmp_path / "methods.webp").height

    assert height(9) == height(64) == pytest.approx(3 * height(1), abs=30)
    assert height(8) == pytest.approx(2 * height(1), abs=30)
