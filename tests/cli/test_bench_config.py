"""A committed folder's `config.json` is a configuration: it asks for what made the folder."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import more_hf
import more_hf_bench.artists.judges as judges
import more_hf_bench.artists.run as artists
import more_hf_bench.attacks.classes.run as attacks_on_classes
import more_hf_bench.attacks.pictures.run as attacks_on_pictures
import more_hf_bench.classes.run as classes
from more_hf.cli.main import main
from more_hf_bench.methods.registry import find_classification_method, find_diffusion_method
from more_hf_bench.run import held_settings, method_settings


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# a script's methods have no name that a command knows
BY_SCRIPT = BENCHMARKS / "attacks" / "pictures" / "given"
COMMITTED = sorted(
    path
    for path in BENCHMARKS.rglob("config.json")
    if held_settings(path.parent) and BY_SCRIPT not in path.parents
)
RUNS = {
    "artists": (artists, "run_artists"),
    "kd": (classes, "run_kd"),
    "kd-samples": (classes, "run_kd"),
    "attacks-classes": (attacks_on_classes, "run_class_attacks"),
    "attacks-pictures": (attacks_on_pictures, "run_picture_attacks"),
}


class CalledError(ValueError):
    """Raised in place of a run."""


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.parent.relative_to(BENCHMARKS)))
def test_a_folder_can_be_run_again(path, monkeypatch, tmp_path):
    held, called = json.loads(path.read_text("utf-8")), {}
    module, name = RUNS[held.get("benchmark", "artists")]
    signature = inspect.signature(getattr(module, name))

    def run(*args, **options):
        called.update(signature.bind(*args, **options).arguments)
        raise CalledError

    monkeypatch.setattr(module, name, run)
    monkeypatch.setattr(more_hf, "load_emoji_sd", lambda **options: SimpleNamespace())
    monkeypatch.setattr(judges, "EmojiJudges", lambda device: None)
    bench = {"kd": "kd", "kd-samples": "kd"}.get(held.get("benchmark"), held.get("benchmark", "artists"))
    command = ["bench", bench.split("-")[0], "--config", str(path), "--output", str(tmp_path)]
    # prompts that do not ship with the package, as the page's command names them
    named = held.get("evaluation", {}).get("prompts")
    prompts = BENCHMARKS / "attacks" / "pictures" / "sample" / f"{named}.csv"
    if prompts.is_file():
        command += ["--prompts", str(prompts)]
    assert main(command) == 2
    assert called["seeds"] == held["seeds"]

    # the methods, with the settings that the folder holds of them
    of_pictures = bench in ("artists", "attacks-pictures")
    asked = called["methods"]
    assert asked == [method for method in held["methods"] if method not in held.get("references", ())]
    for method in asked:
        tuned, plain = called["tuned"][method], method.removesuffix("-reloaded")
        if of_pictures:
            function, without = find_diffusion_method(method), artists.GIVEN
        else:
            forgets = "samples" if held["benchmark"] == "kd-samples" else "classes"
            function, without = find_classification_method(plain, forgets=forgets), classes.NOT_SETTINGS
        settings = held["methods"][method]
        assert method_settings(function, tuned, without=without, held=settings) == settings

    # what is forgotten, on which prompts or data
    if bench == "artists":
        prompts = called["prompts"]
        assert {entry: vars(erasure) for entry, erasure in called["forget"].items()} == held["forget"]
        made = held["generation"]
        assert (prompts.name, prompts.sha256) == (made["prompts"], made["prompts_sha256"])
        assert (called["steps"], called["guidance"]) == (made["steps"], made["guidance"])
        assert (called["limit"], prompts.kind.name) == (held["limit"], held["kind"])
    elif bench == "kd":
        training = held["training"]
        assert (called["dataset"], called["model"]) == (training["dataset"], training["model"])
        assert called["epochs"] == training["recipe"]["epochs"]
        if held["benchmark"] == "kd":
            assert called["forget"] == list(held["forget"])
            assert {key: called[key] for key in held["evaluation"]} == held["evaluation"]
        else:
            assert called["forget"] == "samples"
            assert called["fraction"] == held["evaluation"]["fraction"]
    else:
        assert (called["attacks"], called["forget"]) == (list(held["attacks"]), list(held["forget"]))
        for attack in held["attacks"]:
            assert called["tuned"][attack] == held["attacks"][attack]
        if of_pictures:
            assert called["name"] in held["models"]
            assert called["prompts"].sha256 == held["evaluation"]["prompts_sha256"]
            assert called["lessons"].sha256 == held["evaluation"]["lessons_sha256"]
            several = {concept: erasure["several"] for concept, erasure in held["forget"].items()}
            assert called["targets"] == several
        else:
            assert called["models"] == list(held["models"])
            assert called["limit"] == held["evaluation"]["labelled"]


def test_a_folder_of_another_model_takes_its_scheduler(tmp_path, monkeypatch):
    held = json.loads((BENCHMARKS / "artists" / "results" / "config.json").read_text("utf-8"))
    held["model"] = "me/model"
    held["generation"]["scheduler"]["class"] = "LMSDiscreteScheduler"
    held["judges"] = "CLIP ViT-L-14 openai"
    (tmp_path / "config.json").write_text(json.dumps(held))
    called = {}

    def run(*args, **options):
        called.update(options)
        raise CalledError

    monkeypatch.setattr(artists, "run_artists", run)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *args, **options: None)
    load = {}
    monkeypatch.setattr(judges.ClipJudges, "load", lambda rows, **options: load.update(options))
    command = ["bench", "artists", "--config", str(tmp_path / "config.json"), "--output", str(tmp_path)]
    assert main(command) == 2
    assert called["scheduler"] == "lms"
    assert (load["model"], load["pretrained"]) == ("ViT-L-14", "openai")
