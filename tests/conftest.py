import copy
import gc
import os
import shutil
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before the first Hugging Face import reads it
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers fill the cores; a second thread in one would only wait. Before torch starts its threads.
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
from support.compare import state
from support.pipelines import build_tiny_sd
from torch.utils.data import DataLoader, TensorDataset

import more_hf
from more_hf.data import load_emoji_sd
from more_hf.diffusion import prompts as packaged


# The suite is the same at every run; `--hypothesis-profile=long` looks for what it has missed.
OPTIONS = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("suite", derandomize=True, max_examples=30, database=None, **OPTIONS)
hypothesis.settings.register_profile("long", max_examples=1000, **OPTIONS)
hypothesis.settings.load_profile("suite")


# More threads than this cost more than they give at the sizes of these tests.
torch.set_num_threads(min(4, torch.get_num_threads()))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What all these imports leave behind is no garbage: the collector need not walk through it."""
    gc.disable()
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


EVERY_PROMPT = packaged.packaged_prompts


@pytest.fixture(scope="session", autouse=True)
def fewer_ordinary_prompts():
    """Every eighth of the general prompts behind Σ: encoding all 372 is what most tests would wait for."""

    def fewer(file):
        return EVERY_PROMPT(file)[:: 8 if file == "everyday_prompts.txt" else 1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packaged, "packaged_prompts", fewer)
        yield


@pytest.fixture
def every_ordinary_prompt(monkeypatch):
    """All of them after all."""
    monkeypatch.setattr(packaged, "packaged_prompts", EVERY_PROMPT)


@pytest.fixture(scope="module")
def one_thread():
    """A module's tests on one thread; all others share the number set above."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emoji_sd():
    """The embedded pipeline, loaded once. Do not modify it: `copy_of_emoji_sd` is for that."""
    pipe = load_emoji_sd()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def copy_of_emoji_sd(emoji_sd):
    """A factory of independent copies of the embedded pipeline."""
    return lambda: copy.deepcopy(emoji_sd)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Moments of everyday prompts are kept for the session, and nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("more_hf.diffusion.kept.CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def tiny_sd():
    """A factory: `tiny_sd(version="1" or "2", seed=0, **unet_options)`."""
    return build_tiny_sd


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub in memory, which `push_to_hub` takes for the real one."""
    from support.hub import Hub

    hub = Hub(tmp_path)
    monkeypatch.setattr("more_hf.saving.push.HfApi", lambda **options: hub)
    return hub


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory):
    """A folder that `save` wrote, with the factors, and the original denoiser's state. Read only."""
    from support.hub import erase

    pipe = build_tiny_sd()
    original = state(pipe.unet)
    return more_hf.save(
        erase(pipe, router="random"), tmp_path_factory.mktemp("saved") / "erased", include_delta=True
    ), original


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy of the folder that a test may change."""
    return Path(shutil.copytree(saved_once[0], tmp_path / "erased"))


@pytest.fixture(scope="module")
def short_prompts():
    """See `support.families.shorten`."""
    from support.families import shorten

    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture
def cogview_3(monkeypatch):
    """A pipeline of a family that the package does not know; what a test registers is gone after it."""
    from diffusers import CogView3PlusPipeline
    from support.families import build, shorten

    from more_hf.diffusion import families

    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(families, "_REGISTERED", set())
    shorten(monkeypatch, CogView3PlusPipeline)
    return build()


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps the precision of a process's first `Accelerator`."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def families():
    """The newer families, by name. Not to be modified."""
    from support.families import Built, build

    return Built(build)


@pytest.fixture(scope="module")
def erased_families(families, short_prompts):
    """The same, erased. Not to be modified."""
    from support.families import Built, copied, erase

    return Built(lambda family: erase(copied(families[family])))


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits `(1797, 1, 8, 8)` in [0, 1], and labels. Train on the first 1200."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@pytest.fixture(scope="session")
def digit_classifier(digits):
    """A small ResNet, trained here on digits to 94 % on the last 597. Copy it before changing it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    images, labels = digits
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(DIGITS)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNetForImageClassification(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(6):
            for rows in torch.randperm(1200).split(60):
                optimizer.zero_grad()
                model(images[rows], labels=labels[rows]).loss.backward()
                optimizer.step()
    return model.eval()


@pytest.fixture
def model(digit_classifier):
    """A copy of it that a test may change."""
    return copy.deepcopy(digit_classifier)


@pytest.fixture
def loader(digits):
    images, labels = digits
    return DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=100)


@pytest.fixture(scope="session")
def prototypes(digit_classifier, digits):
    images, labels = digits
    return more_hf.collect_prototypes(digit_classifier, [(images[:1200], labels[:1200])])
