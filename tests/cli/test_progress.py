"""What stderr says while something takes long: a line for each stage, and bars that heed the switches."""

from itertools import groupby

import pytest
from support.families import FORGET, TARGET, erase
from support.pipelines import build_tiny_sd
from torch.utils.data import DataLoader, TensorDataset
from transformers.utils import logging as transformers_logging

import more_hf
from more_hf.cli import request
from more_hf.cli.main import main


pytestmark = pytest.mark.usefixtures("short_prompts")
WORDS = ["--concept", FORGET, "--remap_to", TARGET, "--output"]


def test_what_the_commands_say_while_they_work(tmp_path, capsys):
    build_tiny_sd().save_pretrained(tmp_path / "sd")
    assert main(["erase", str(tmp_path / "sd"), *WORDS, str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    words = ("Loading /", "Erasing ", "Encoding ", "Running ", "Saving ")
    stages = [line for line in lines if line.startswith(words)]
    # First the names' prompts, then everyday ones. What is saved is checked with prototypes of its own.
    seen = [word for word, _ in groupby(line.split()[0] for line in stages)]
    assert seen == [*(word.strip(" /") for word in words), "Encoding"]
    assert "in float32 for cpu" in stages[0]


def test_the_first_process_speaks(monkeypatch, capsys):
    def speak(args):
        request.logger.info("a stage")
        request.logger.warning("a warning")
        raise ValueError("the end")

    monkeypatch.setattr("more_hf.cli.erase.read_request", speak)
    monkeypatch.setenv("RANK", "1")
    assert main(["erase", "emoji-sd", *WORDS, "out"]) == 2
    assert capsys.readouterr().err == "a warning\nError: the end\n"
    monkeypatch.setenv("RANK", "0")
    assert main(["erase", "emoji-sd", *WORDS, "out"]) == 2
    assert capsys.readouterr().err == "a stage\na warning\nError: the end\n"


def test_encoding_prompts_has_the_bar_of_the_pipeline(monkeypatch, capsys):
    pipe = build_tiny_sd()
    pipe.set_progress_bar_config()
    erase(pipe)
    assert "Encoding" not in capsys.readouterr().err  # too quick for a bar
    monkeypatch.setattr("more_hf.diffusion.encoder.DELAY", 0)
    erase(pipe, "picasso")
    assert "Encoding prompts" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    erase(pipe, "andy warhol")
    assert capsys.readouterr().err == ""


def test_collecting_features_has_a_bar(model, digits, monkeypatch, capsys):
    loader = DataLoader(TensorDataset(digits[0][:200], digits[1][:200]), batch_size=64)
    more_hf.collect_prototypes(model, loader)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("more_hf.classification.features.DELAY", 0)
    more_hf.collect_prototypes(model, loader)
    assert "4/4" in capsys.readouterr().err
    transformers_logging.disable_progress_bar()
    try:
        more_hf.collect_prototypes(model, loader)
    finally:
        transformers_logging.enable_progress_bar()
    assert capsys.readouterr().err == ""
