import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.compare import same, state
from support.processes import launched

from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.models import build_classifier
from more_hf_bench.classes.training import (
    Batches,
    Recipe,
    accuracy,
    augment,
    learning_rate,
    predict,
    train_classifier,
)
from more_hf_bench.errors import BenchmarkError


RECIPE = Recipe(epochs=2, batch_size=100, learning_rate=3e-3, warmup_steps=5, shift=1, flip=False)

# As in the script: sums over another number of threads are rounded otherwise.
pytestmark = pytest.mark.usefixtures("one_thread")

# A process that trains on 520 digits with a checkpoint after every step, and kills itself in the step after
# `kill_after`.
SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from more_hf_bench.classes import training as kd_training
sys.path[:0] = {tests!r}
from test_training import RECIPE, images, train
steps = 0
augment = kd_training.augment
def count(*arguments):
    global steps
    steps += 1
    if steps > {kill_after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return augment(*arguments)
kd_training.augment = count
train({output!r}, {name!r})
"""


@pytest.fixture(scope="module")
def digits():
    return load_kd_data("digits")


def images():
    return load_kd_data("digits").train.subset(torch.arange(520))


def train(output, name="allcnn-narrow", recipe=RECIPE, validation=None):
    model = build_classifier(name, load_kd_data("digits"))
    return train_classifier(model, images(), recipe, output=output, validation=validation, save_seconds=0)


def start(output, name, kill_after, **environment):
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    script = SCRIPT.format(tests=tests, kill_after=kill_after, output=str(output), name=name)
    options = {"env": {**os.environ, **environment}, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], **options)


@pytest.mark.slow
def test_training_learns_and_is_only_loaded_the_second_time(digits, tmp_path):
    validation = digits.validation
    model = train(tmp_path, recipe=replace(RECIPE, epochs=6), validation=validation)
    assert not model.training
    right = accuracy(predict(model, validation), validation.labels)
    assert right > 60
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [row["epoch"] for row in rows] == list("123456")
    assert float(rows[-1]["accuracy_validation"]) == pytest.approx(right, abs=1e-3)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert rows[-1]["step"] == "36"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "model", "training.json"]
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    again = train(tmp_path, recipe=replace(RECIPE, epochs=6), validation=validation)
    assert same(model, again.state_dict())
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_killed_and_run_again_it_ends_the_same(tmp_path):
    """Also with a half-written checkpoint beside, weights and log are those of one run."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed, "allcnn-narrow", kill_after=8)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-8"]
    assert not (killed / "model").exists()
    (killed / ".checkpoint.part").mkdir()
    (killed / ".checkpoint.part" / "model.safetensors").write_bytes(b"torn")
    one, other = train(killed), train(whole)
    assert same(one, other.state_dict())
    logs = (csv.DictReader((folder / "log.csv").open()) for folder in (killed, whole))
    first, second = ([{**row, "seconds": ""} for row in log] for log in logs)
    assert first == second
    third = train(tmp_path / "other", recipe=replace(RECIPE, seed=1))
    assert not same(other, third.state_dict())


@pytest.mark.slow
def test_two_processes_train_the_same_model(tmp_path, digits):
    """Without BatchNorm, the gradient over two halves of each batch is that of the batch, up to rounding."""
    both = [start(tmp_path / "two", "vit-narrow", 1_000, **environment) for environment in launched(2)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    one, two = (train(tmp_path / name, "vit-narrow") for name in ("one", "two"))  # the second is only loaded
    models = (one, two, build_classifier("vit-narrow", digits).eval())
    pixels = digits.test[torch.arange(100)]["pixel_values"]
    with torch.no_grad():
        one, two, before = (model(pixel_values=pixels).logits for model in models)
    assert (one - two).abs().max() < 0.02 < 0.5 < (one - before).abs().max()


@pytest.mark.parametrize("change", [{"recipe": replace(RECIPE, learning_rate=1e-3)}, {"name": "vit-narrow"}])
def test_a_folder_with_another_training_is_refused(tmp_path, change):
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="model is None"):
        train(tmp_path)
    (tmp_path / "training.json").unlink()
    train(tmp_path, recipe=replace(RECIPE, epochs=0))
    facts = json.loads((tmp_path / "training.json").read_text())
    with pytest.raises(BenchmarkError, match="holds another training: its (recipe|model) is"):
        train(tmp_path, **{"recipe": replace(RECIPE, epochs=0), **change})
    assert json.loads((tmp_path / "training.json").read_text()) == facts


def test_batches_visit_every_image_once_in_an_epoch():
    recipe = Recipe(batch_size=4, seed=3)
    whole = list(Batches(10, recipe, 3, range(0, 6), slice(None)))
    assert [len(batch) for batch in whole] == [4, 4, 2, 4, 4, 2]
    assert sorted(torch.cat(whole[:3]).tolist()) == sorted(torch.cat(whole[3:]).tolist()) == list(range(10))
    assert not torch.cat(whole[:3]).equal(torch.cat(whole[3:]))
    later = list(Batches(10, recipe, 3, range(4, 6), slice(None)))
    assert [batch.tolist() for batch in later] == [batch.tolist() for batch in whole[4:]]
    halves = [list(Batches(10, recipe, 3, range(0, 6), slice(rank, None, 2))) for rank in range(2)]
    joined = [sorted(torch.cat(pair).tolist()) for pair in zip(*halves, strict=True)]
    assert joined == [sorted(batch.tolist()) for batch in whole]
    batches = Batches(10, recipe, 3, range(0, 6), slice(None))
    assert [batches.size(step) for step in range(6)] == [len(batch) for batch in whole]


def test_augment_moves_and_mirrors():
    """Each result is one of the crops of the padded image, mirrored or not, and all of them occur."""
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="replicate")[0, 0]
    crops = [padded[top : top + 3, left : left + 4] for top in range(3) for left in range(3)]
    images, everything = image.expand(2000, 1, 3, 4), (2000, slice(None))
    made = augment(images, 1, True, torch.Generator().manual_seed(0), *everything)[:, 0]
    seen = {tuple(one.flatten().tolist()) for one in made}
    # mirrored crops are crops of the padded image read from right to left
    assert seen == {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(1))}
    straight = augment(images, 1, False, torch.Generator().manual_seed(0), *everything)[:, 0]
    seen = {tuple(one.flatten().tolist()) for one in straight}
    assert seen == {tuple(crop.flatten().tolist()) for crop in crops}
    assert augment(image, 0, False, torch.Generator(), 1, slice(None)).equal(image)
    share = slice(1, None, 2)
    part = augment(images[share], 1, True, torch.Generator().manual_seed(0), 2000, share)
    assert part[:, 0].equal(made[share])


def test_learning_rate_rises_and_falls_to_zero():
    recipe = Recipe(learning_rate=2.0, warmup_steps=10)
    rates = [learning_rate(recipe, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[50] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert max(rates) < 2.0


def test_predict_leaves_the_model_as_it_was(digits):
    model = build_classifier("allcnn-narrow", digits).train()
    before = state(model)
    predicted = predict(model, digits.test, batch_size=100)
    assert model.training
    assert same(model, before)
    pixels = digits.test[torch.arange(len(digits.test))]["pixel_values"]
    with torch.no_grad():
        assert predicted.equal(model.eval()(pixels).logits.argmax(1))


@pytest.mark.usefixtures("fresh_accelerate")
def test_mixed_precision(tmp_path, digits):
    seen = []
    model = build_classifier("allcnn-narrow", digits)
    model.features[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train_classifier(model, images(), replace(RECIPE, epochs=1), output=tmp_path, mixed_precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert model.classifier.weight.dtype == torch.float32
