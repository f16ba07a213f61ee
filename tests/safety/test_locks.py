"""Two calls at once on one model: one waits, and the record says what the weights are."""

import random
import threading

import pytest
import torch
from support.compare import same, state
from support.processes import in_threads
from torch import nn

import more_hf
from more_hf.core.site import Site


pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 4


@pytest.fixture(autouse=True)
def switch_often(monkeypatch):
    """Another thread's turn after every write: interleavings that a fast model hides."""
    write = Site.write

    def slow(site, value):
        write(site, value)
        threading.Event().wait(0.001)

    monkeypatch.setattr(Site, "write", slow)


@pytest.fixture
def one_ordinary_prompt(monkeypatch):
    prompts = ("a dog and a tree",)
    monkeypatch.setattr("more_hf.diffusion.ordinary.everyday_prompts", lambda tokenizer: prompts)


def check(model, core, original):
    """The weights are what the record says, and `restore` gives the original's bits."""
    erasure = more_hf.get_erasure(model)
    if erasure is not None:
        erasure.check_unchanged()
        assert not same(core, original)
        assert core.more_hf_erased == tuple(erasure.concepts)
        more_hf.restore(model)
    assert same(core, original)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in core.modules()]
    assert not any(hooks)


CONCEPTS = ("van gogh", "pablo picasso", "andy warhol")
OPTIONS = {"remap_to": "claude monet", "solver": "pinv", "tokens": "last"}


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_pipeline(tiny_sd, one_ordinary_prompt, seed):
    pipe = tiny_sd()
    original = state(pipe.unet)

    def erase(concept, router):
        more_hf.erase_concept(pipe, concept, **OPTIONS, router=router)

    calls = [lambda concept=concept: erase(concept, "hash") for concept in CONCEPTS]
    calls += [lambda: more_hf.restore(pipe), lambda: more_hf.restore(pipe, "van gogh")]
    random.Random(seed).shuffle(calls)
    in_threads(*calls[: 2 + seed], ignored=more_hf.MoreError)
    check(pipe, pipe.unet, original)


@pytest.mark.parametrize("seed", range(3 * ROUNDS))
def test_classifier(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
        data = [(torch.randn(50, 1, 3, 4), torch.arange(50) % 5)]
    original = state(model)

    def erase(number):
        more_hf.erase_classes(model, data, number, remap_to=[4], head="3", router=("hash", None)[number % 2])

    calls = [lambda number=number: erase(number) for number in range(3)]
    calls += [lambda: more_hf.restore(model), lambda: more_hf.restore(model, [1])]
    calls += [lambda: more_hf.restore(model)]
    random.Random(seed).shuffle(calls)
    in_threads(*calls, ignored=more_hf.MoreError)
    check(model, model, original)


def test_all_that_is_erased_at_once_is_erased(tiny_sd, one_ordinary_prompt):
    pipe = tiny_sd()
    calls = [lambda concept=concept: more_hf.erase_concept(pipe, concept, **OPTIONS) for concept in CONCEPTS]
    in_threads(*calls, ignored=more_hf.MoreError)
    assert sorted(more_hf.get_erasure(pipe).concepts) == sorted(CONCEPTS)
    together = more_hf.erase_concept(tiny_sd(), list(more_hf.get_erasure(pipe).concepts), **OPTIONS)
    assert same(pipe.unet, state(together.unet))


def test_an_erasure_waits_for_the_other(tiny_sd, one_ordinary_prompt, monkeypatch):
    """While one thread writes, `restore` of another one must not read what is half written."""
    pipe = tiny_sd()
    original = state(pipe.unet)
    inside, go_on = threading.Event(), threading.Event()
    real = Site.write

    def write(site, value):
        real(site, value)
        if not inside.is_set():
            inside.set()
            go_on.wait(0.3)

    monkeypatch.setattr(Site, "write", write)
    order = []

    def erase():
        more_hf.erase_concept(pipe, "van gogh", **OPTIONS)
        order.append("erased")

    def restore():
        inside.wait(60)
        more_hf.restore(pipe)
        order.append("restored")

    in_threads(erase, restore, ignored=more_hf.MoreError)
    assert order == ["erased", "restored"]
    assert same(pipe.unet, original)
