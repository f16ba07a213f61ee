"""Trials inside the denoiser, on a tiny pipeline; a painter draws what they are judged by."""

from dataclasses import replace

import pytest
import torch
from support.compare import state
from support.pipelines import build_tiny_sd

import more_hf
from more_hf.diffusion.erase import erase
from more_hf.diffusion.sites import find_denoiser, find_sites
from more_hf.tuning import search


SENTENCES = ["a fox in the style of {}", "a crab by {}", "a pizza in the style of {}", "a bus by {}"]
ASKED = {"candidates": ["Fluent", "Twemoji"], "sentences": SENTENCES, "pictures": 16, "batch_size": 8}


@pytest.fixture
def pipe():
    return build_tiny_sd()


@pytest.mark.slow
def test_trials_inside_the_denoiser(pipe, painter, monkeypatch):
    asked = search.request_of
    monkeypatch.setattr(search, "request_of", lambda *args: replace(asked(*args), pictures=4))  # not 32
    before = state(pipe.unet)
    study = more_hf.tune(pipe, "Noto", **ASKED, reach="denoiser", sampling={"num_inference_steps": 2})
    assert all(torch.equal(before[name], weight) for name, weight in state(pipe.unet).items())
    tried = {judgment.edit for judgment in study.judgments}
    assert {f"to {target}, reach denoiser" for target in ASKED["candidates"]} <= tried
    # a trial has the weights of the proven erasure, also of layers that read no text
    workshop = search.Workshop(pipe, study.setup)
    edit = workshop.edit("Fluent", reach="denoiser")
    with workshop.edited(edit):
        tried = state(pipe.unet)
    erase(pipe, edit.request)
    erased = state(pipe.unet)
    assert all(torch.allclose(tried[name], erased[name], atol=1e-5) for name in tried)
    text = {f"{name}.weight" for name in find_sites(pipe, find_denoiser(pipe))}
    moved = {name for name in tried if not torch.allclose(before[name], tried[name], atol=1e-3)}
    assert text & moved
    assert moved - text
