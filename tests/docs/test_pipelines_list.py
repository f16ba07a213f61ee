"""`benchmarks/pipelines.json`: which committed result was made with which embedded pipeline."""

import json
from pathlib import Path

import pytest

import more_hf
from more_hf_bench.machine import weights_sha256


ROOT = Path(__file__).parents[2] / "benchmarks"
LISTED = json.loads((ROOT / "pipelines.json").read_text())


def recorded_weights(config: Path) -> str | None:
    """The hash of the embedded pipeline's weights that a result's own configuration records, if it does."""
    settings = json.loads(config.read_text())
    if settings.get("model") == "emoji-sd":
        return settings["generation"]["weights"]
    if config.parent.name == "evaluation":
        return settings.get("weights")
    return settings.get("models", {}).get("emoji-sd", {}).get("weights")


RECORDED = {
    config.parent.relative_to(ROOT).as_posix(): weights
    for config in sorted(ROOT.rglob("config.json"))
    if (weights := recorded_weights(config)) is not None
}


def test_current_pipeline_is_the_one_in_the_package():
    assert LISTED["current"] == weights_sha256(more_hf.load_emoji_sd())


def test_every_result_that_records_a_pipeline_is_listed_with_it():
    assert len(RECORDED) >= 8
    listed = {name: LISTED["results"].get(name) for name in RECORDED}
    assert listed == RECORDED


@pytest.mark.parametrize("name", LISTED["results"])
def test_listed_result_exists(name):
    assert (ROOT / name).exists()


def test_pages_say_which_results_are_older():
    """A result of an earlier pipeline is named in the table of `benchmarks/README.md`, and no other is."""
    page = (ROOT / "README.md").read_text()
    _, _, section = page.partition("## Measured on an earlier pipeline\n")
    section, _, _ = section.partition("\n## ")
    older = {name for name, weights in LISTED["results"].items() if weights != LISTED["current"]}
    named = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    assert named == older
