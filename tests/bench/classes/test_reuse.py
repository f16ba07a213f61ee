"""What the benchmark does once instead of often: features of the original, samples of many probe steps."""

import copy

import pytest
import torch
from support.rows import records

from more_hf.api import get_erasure
from more_hf.data import load_classifier
from more_hf_bench.classes import run as kd
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.features import cache, head_only, splits_of_features
from more_hf_bench.classes.probes import GATHER_STEPS, batches
from more_hf_bench.methods.registry import CLASSIFICATION, methods_that_forget
from more_hf_bench.splits import split_by_class


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data():
    return load_kd_data("digits")


@pytest.fixture(scope="module")
def original():
    return load_classifier("digits-allcnn").eval()


def logits(model, images):
    if (erasure := get_erasure(model)) is not None and erasure.router == "random":
        erasure.hook.router.reset(range(len(images)))
    with torch.no_grad():
        return model(images[torch.arange(len(images))]["pixel_values"]).logits


@pytest.mark.parametrize("method", [n for n, m in methods_that_forget("classes").items() if m.closed_form])
def test_a_closed_form_on_cached_features_is_the_one_on_images(method, original, data):
    splits, function = split_by_class(data, [3]), CLASSIFICATION[method].load()
    expected = function(copy.deepcopy(original), splits, seed=0)
    model = copy.deepcopy(original)
    inputs = cache(model, model.classifier, {"train": data.train}).inputs["train"]
    with head_only(model, model.classifier):
        found = function(model, splits_of_features(splits, data.train, inputs), seed=0)
    for part in (splits.ft, splits.rt):
        assert torch.allclose(logits(found, part), logits(expected, part), atol=2e-3)
    assert not torch.allclose(logits(found, splits.ft), logits(original, splits.ft), atol=0.1)
    if method == "pour":  # which reads the head alone
        return
    shuffled = splits_of_features(splits, data.train, inputs.flip(0))  # other features: another edit
    model = copy.deepcopy(original)
    with head_only(model, model.classifier):
        other = function(model, shuffled, seed=0)
    assert not torch.allclose(logits(other, splits.ft), logits(expected, splits.ft), atol=0.1)


def test_only_the_first_cells_of_a_closed_form_have_a_price(tmp_path):
    options = {"output": tmp_path, "seeds": 2, "epochs": 1, "probe_seeds": 1}
    summary = kd.run_kd("digits", "allcnn-narrow", ["esc", "esc-t"], ["3", "4"], **options)
    rows = {(row["method"], row["forget"], row["seed"]): row for row in records(tmp_path / "rows.csv")}
    priced = {key for key, row in rows.items() if row["seconds"] is not None}
    assert priced == {("esc", "3", 0), *(("esc-t", forget, seed) for forget in "34" for seed in (0, 1))}
    lines = {(line["method"], line["forget"]): line for line in summary}
    assert lines["esc", "all"]["seconds"] == rows["esc", "3", 0]["seconds"]
    assert lines["esc", "4"]["seconds"] is None


def test_every_step_has_its_samples():
    n, seeds, size = GATHER_STEPS * 4 * 2 + 7, 3, 4
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(n, 2, generator=generator) for _ in range(seeds)]
    targets, orders = (
        torch.randn(n, 5, generator=generator),
        [torch.randperm(n, generator=generator) for _ in range(seeds)],
    )
    steps = list(batches(features, targets, orders, size))
    assert len(steps) == -(-n // size)
    for step, (x, y) in enumerate(steps):
        for seed, order in enumerate(orders):
            rows = order[step * size : (step + 1) * size]
            assert torch.equal(x[seed], features[seed][rows])
            assert torch.equal(y[seed, 0].T, targets[rows])
