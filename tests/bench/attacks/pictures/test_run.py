"""The run: every attack, resumed, and what it refuses."""

import json

import pytest
import torch
from support.victims import StubJudges, prompt_rows

from more_hf_bench.artists.prompts import Prompts
from more_hf_bench.attacks.pictures.run import run_picture_attacks
from more_hf_bench.attacks.registry import ATTACKS, attacks_of
from more_hf_bench.columns import read_cells
from more_hf_bench.errors import BenchmarkError


TINY = {
    "noise": {"eta": [1.0], "variance_scale": [1.0], "budgets": [1]},
    "closed-form": {"rho": 1e-3},
    "base": {"added": [0.5], "encoder_noise": [0.1]},
    "ring-a-bell": {"eta": [0.9], "tokens": 3, "population": 4, "generations": 1},
    "latent": {"pictures": 2, "steps": 2},
    "inversion": {"tokens": [1], "steps": [1, 2], "pictures": 2, "batch_size": 2},
    "relearning": {
        "lessons": ["lora own 2", "kv benign 2", "kv other-word 2"],
        "steps": [1],
        "batch_size": 2,
    },
    "text-free": {"pictures": 2, "steps": 2, "corrections": 1, "fresh": [0.5]},
    "image-to-image": {"strengths": [0.5], "prompts": ["empty"], "pictures": 2, "steps": 2},
    "inpainting": {"prompts": ["empty"], "pictures": 2, "steps": 2},
    "prompt-search": {"timesteps": 1, "iterations": 1, "budgets": [1]},
}


@pytest.fixture
def run(tiny_sd, tmp_path):
    options = {
        "prompts": Prompts("tests", "0", prompt_rows("a {thing} by {artist}")),
        "lessons": Prompts("lessons", "1", prompt_rows("{artist} {thing}", first=100)),
        "targets": {"van gogh": ["claude monet"], "cat": ["dog", "tree"]},
        "tuned": TINY, "judges": StubJudges(), "output": tmp_path, "steps": 2, "guidance": 2.0, "limit": 2,
    }  # fmt: skip

    def run(attacks, forget=("van gogh",), **changes):
        return run_picture_attacks(tiny_sd("2"), "tiny", ["more"], attacks, forget, **{**options, **changes})

    return run


@pytest.mark.slow
def test_every_attack_on_an_artist_and_a_thing(run, tmp_path):
    attacks = [name for name in attacks_of("pictures") if not ATTACKS[name].on_request]
    summary = run(attacks, ["van gogh", "cat"])
    assert {line["attack"] for line in summary} == set(attacks)
    assert {line["method"] for line in summary} == {"original", "more"}
    rows = read_cells(tmp_path / "rows.csv")
    assert {row["forget"] for row in rows} == {"van gogh", "cat"}
    assert (tmp_path / "van-gogh.webp").is_file()
    assert (tmp_path / "cat.webp").is_file()


def test_a_description_needs_prompts_of_the_concept(run):
    with pytest.raises(BenchmarkError, match="emoji_levels has no prompts of 'van gogh'"):
        run(["description"])


def test_nothing_is_measured_twice(run, tmp_path, monkeypatch):
    run(["name"])
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(cells) == 2
    monkeypatch.setattr("more_hf_bench.attacks.pictures.run._erased", None)  # which would be called
    run(["name"])
    assert cells == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    monkeypatch.undo()
    run(["closed-form"])
    assert len(list((tmp_path / "cells").iterdir())) == 4


def test_a_concept_without_a_target_is_refused_before_anything(run, tmp_path):
    with pytest.raises(BenchmarkError, match="no target for 'dog'"):
        run(["name"], ["dog"])
    with pytest.raises(BenchmarkError, match="takes no `paper`"):
        run(["inversion"], tuned={"inversion": {"paper": True}})
    assert not any(tmp_path.iterdir())


def test_targets_and_what_is_kept(run, tmp_path):
    run(["name"], ["van gogh", "cat"])
    forget = json.loads((tmp_path / "config.json").read_text())["forget"]
    assert forget["van gogh"]["retain"] == ["claude monet", "pablo picasso"]
    assert forget["van gogh"]["other"] == "pablo picasso"  # not the target
    assert forget["cat"]["remap_to"] == ["dog"]
    assert forget["cat"]["retain"] == ["dog", "house", "tree"]
    assert forget["cat"]["other"] == "house"


def test_pictures_of_a_thing_are_captioned_without_it(tiny_victim):
    pictures = tiny_victim().studio.pictures("cat", 2)
    assert pictures.captions == ["van gogh {name}", "claude monet {name}"]
    assert pictures.latents.dtype == torch.float32
