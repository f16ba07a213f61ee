"""What holds for every method for classifiers, and how much each one forgets."""

import pytest
import torch
from support.compare import state
from support.squares import accuracy, all_of, unlearn
from torch import nn

from more_hf.api import get_erasure
from more_hf_bench.methods.registry import CLASSIFICATION, methods_that_forget


DRAWN = {name for name, method in CLASSIFICATION.items() if method.trained}
DRAWN |= {"fisher", "esc-as-released", "remap", "more", "more-hash", "more-paper", "more-inner"}
FEW_STEPS = {"esc-t", "lau", "more-prototype", "more-trained"}  # the order of batches may not show
WITHOUT = ("erase-without-po", "remap-without-po", "erase-without-complement", "remap-without-complement")
MAPPED = ("esc", "esc-as-released", "esc-t", "esc-t-as-released", "leace-rest", "leace-target", *WITHOUT)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in methods_that_forget("classes") if name != "retrain"])
def test_same_seed_same_model_and_caller_untouched(name, model, splits):
    random_state = torch.random.get_rng_state()
    images, _ = all_of(splits)
    outputs = []
    # At its own rate a few steps of ESC-T move no entry below the threshold.
    settings = {"lr": 10.0} if name == "esc-t" else {}
    for seed in (0, 0, 1):
        edited = unlearn(name, model, splits, seed=seed, **settings)
        assert not edited.training
        if name in ("more", "more-paper", "more-inner"):
            # The router draws anew in every process.
            get_erasure(edited).hook.router.reset(range(len(images)))
        with torch.no_grad():
            outputs.append(edited(images))
    assert torch.equal(outputs[0], outputs[1])
    if name not in FEW_STEPS:
        assert torch.equal(outputs[0], outputs[2]) == (name not in DRAWN)
    with torch.no_grad():
        assert torch.equal(outputs[0], model(images)) == (name == "original")
    assert torch.equal(torch.random.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("neggrad", {"lr": 0.02, "epochs": 20}),
        ("neggrad-plus", {"alpha": 0.5, "epochs": 20, "lr": 0.02}),
        ("random-labels", {"lr": 0.05, "epochs": 30}),
        ("salun", {"lr": 0.1, "epochs": 30}),
        ("boundary-shrink", {"lr": 0.01, "epochs": 20, "bound": 1.5}),
        ("scrub", {"lr": 0.02, "epochs": 8, "max_epochs": 6, "gamma": 1.0}),
        ("bad-teacher", {"lr": 0.01, "epochs": 40}),
        ("lau", {"lr": 0.1, "epochs": 20, "bound": 3.0}),
        ("esc-t", {"lr": 10.0}),
        ("erase-without-po", {}),
        ("remap-without-po", {}),
        ("leace-rest", {}),
    ],
)
def test_forgets_more_than_it_loses(name, settings, model, splits):
    edited = unlearn(name, model, splits, **settings)
    assert accuracy(edited, splits.f) < accuracy(edited, splits.r) - 0.2


@pytest.mark.parametrize("name", MAPPED)
def test_maps_leave_the_weights_alone(name, model, splits):
    before = state(model)
    edited = unlearn(name, model, splits)
    assert all(torch.equal(p, before[key]) for key, p in edited.named_parameters())


def test_retrain_fits_what_remains_alone(model, splits):
    asked = []
    fresh = nn.Linear(1, 1)

    def fit(images, seed):
        asked.append((images, seed))
        return fresh

    assert unlearn("retrain", model, splits, seed=3, fit=fit) is fresh
    assert asked == [(splits.r, 3)]
