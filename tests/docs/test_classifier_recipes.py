"""The scripts of benchmarks/classifiers run, on digits, and what is committed there fits together."""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

import more_hf.data
from more_hf.classification.features import collect_prototypes
from more_hf.data import CLASSIFIERS, load_classifier
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.training import FINE_TUNING, Recipe, accuracy, predict
from more_hf_bench.columns import read_cells


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks" / "classifiers"


@pytest.fixture
def run(monkeypatch):
    """Run a script's `main` with arguments, its module changed by `setup` first."""

    def call(script, *arguments, setup=lambda module: None):
        spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        setup(module)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        threads = torch.get_num_threads()
        try:
            module.main()
        finally:
            torch.set_num_threads(threads)
        return module

    return call


@pytest.mark.slow
def test_train_and_package(run, tmp_path, monkeypatch):
    """Packaged file, row and table are of one model; the command names no folder of this machine."""
    shutil.copy(SCRIPTS / "README.md", tmp_path)
    monkeypatch.setattr(more_hf.data, "FOLDER", tmp_path)

    def setup(module):
        module.HERE, module.PACKAGED = tmp_path, tmp_path / "classifiers"

    options = (
        "--dataset digits --model allcnn-narrow --epochs 3 --batch_size 64 --warmup_steps 5 --shift 0".split()
    )
    options += ["--output", tmp_path / "run", "--package"]
    run("train", *options, "digits-allcnn", setup=setup)
    (row,) = read_cells(tmp_path / "classifiers.csv")
    model, data = load_classifier("digits-allcnn"), load_kd_data("digits")
    right = accuracy(predict(model, data.test), data.test.labels)
    assert float(row["accuracy_test"]) == pytest.approx(right, abs=0.01)
    with safe_open(tmp_path / "classifiers" / "digits-allcnn" / "model.safetensors", "pt") as file:
        assert file.get_tensor("classifier.weight").dtype == torch.float16
    assert row["command"].endswith("--output RUN --package digits-allcnn")
    readme = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "classifiers.csv").read_text() + readme
    assert row["command"] in readme
    assert readme.count("digits-vit") == 0  # the old table is gone
    assert readme.startswith("# Classifiers to forget with")
    assert "the paper's own classifiers" in readme
    run("train", *options, "digits-vit", setup=setup)  # already trained
    assert [row["name"] for row in read_cells(tmp_path / "classifiers.csv")] == [
        "digits-allcnn",
        "digits-vit",
    ]


def test_train_from_a_pretrained_classifier(run, tmp_path, capsys):
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=5
    )
    ResNetForImageClassification(config).save_pretrained(tmp_path / "start")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "start")
    places = ("--pretrained", tmp_path / "start", "--output", tmp_path / "run")
    run("train", *"--dataset digits --epochs 1 --threads 1".split(), *places)
    assert re.search(r"training accuracy [\d.]+ %, test accuracy [\d.]+ %", capsys.readouterr().out)
    facts = json.loads((tmp_path / "run" / "training.json").read_text())
    assert facts["image_size"] == 16
    # what is not given is the recipe for fine-tuning this architecture
    assert Recipe(**facts["recipe"]) == replace(FINE_TUNING["resnet"], epochs=1, flip=False)
    assert facts["config"]["id2label"]["9"] == "9"


def test_erase_cost(run, tmp_path):
    run("erase_cost", "--classifiers", "digits-allcnn", "--limit", 500, "--repeats", 1, "--output", tmp_path)
    (row,) = read_cells(tmp_path / "erase_cost.csv")
    assert row["images"] == "500"
    assert float(row["seconds_erase"]) > 0
    forward, erase = float(row["seconds_forward_each"]), float(row["seconds_erase_each"])
    # of seconds rounded to six places
    assert float(row["overhead"]) == pytest.approx(100 * (erase / forward - 1), abs=0.1)
    assert float(row["statistics_mib"]) == pytest.approx(8 * (32 * 10 + 10 + 32 * 32) / 2**20, abs=1e-3)
    assert "digits-allcnn" in (tmp_path / "erase_cost.md").read_text()


def test_an_erasure_runs_every_image_once(run, tmp_path):
    """On a clock that counts images: as many as the bare pass, and the two that the head is found with."""
    images = 0

    def count(module, args):
        nonlocal images
        images += len(args[0])

    def counted(name):
        model = load_classifier(name)
        model.register_forward_pre_hook(count)
        return model

    def setup(module):
        module.load_classifier, module.time = counted, SimpleNamespace(process_time=lambda: images)

    options = "--classifiers digits-allcnn --limit 600 --repeats 2 --output".split()
    run("erase_cost", *options, tmp_path, setup=setup)
    (row,) = read_cells(tmp_path / "erase_cost.csv")
    assert (float(row["seconds_forward"]), float(row["seconds_erase"])) == (600, 602)
    assert row["overhead_each"] == "0.33 0.33"


@pytest.mark.slow
def test_ten_classes(run, tmp_path):
    run("ten_classes", "--classifiers", "digits-allcnn", "--forget", 3, 8, "--output", tmp_path)
    rows = read_cells(tmp_path / "ten_classes.csv")
    assert len(rows) == 2 * 14
    for row in rows:
        assert float(row["acc_ft_before"]) > 90
        assert float(row["acc_rt_before"]) > 95
        # Without a router, what is saved is what is seen.
        if row["method"].split()[0] in ("erase", "remap", "remap-nearest", "more-mean", "default"):
            assert row["acc_rt"] == row["acc_rt_reloaded"]
            assert row["acc_ft"] == row["acc_ft_reloaded"]
        if row["method"] in ("remap (pinv)", "more-mean (pinv)", "default (pinv)"):
            assert row["acc_ft"] == "0.0"
    P = collect_prototypes(load_classifier("digits-allcnn"), load_kd_data("digits").train.loader(500)).matrix
    unit = torch.nn.functional.normalize(P, dim=0)
    gram = unit.T @ unit - 2 * torch.eye(10)
    sent = [int(row["sent_to"]) for row in rows if row["method"] == "remap-nearest (pinv)"]
    assert sent == gram.argmax(1)[[3, 8]].tolist()
    met = [float(r["acc_rt"]) >= float(r["acc_rt_before"]) - 0.5 and float(r["acc_ft"]) <= 0.5 for r in rows]
    assert [row["met"] for row in rows] == [str(value) for value in met]
    remap = [row for row in rows if row["method"] == "remap (pinv)"]
    line = f"- digits-allcnn, remap (pinv): {sum(row['met'] == 'True' for row in remap)} of 2"
    assert line in (tmp_path / "ten_classes.md").read_text()


def test_committed_classifiers_have_rows_notices_and_little_weight():
    rows = {row["name"]: row for row in read_cells(SCRIPTS / "classifiers.csv")}
    assert sorted(rows) == sorted(CLASSIFIERS)
    notice = (ROOT / "more_hf" / "data" / "NOTICE.md").read_text()
    for name in CLASSIFIERS:
        file = ROOT / "more_hf" / "data" / "classifiers" / name / "model.safetensors"
        assert file.stat().st_size < 3_000_000
        assert int(rows[name]["kilobytes"]) == file.stat().st_size // 1000
        counted = sum(parameter.numel() for parameter in load_classifier(name).parameters())
        assert int(rows[name]["parameters"]) == counted
        assert f"`{name}`" in notice
        assert rows[name]["command"] in (SCRIPTS / "README.md").read_text()
