"""The registries of methods: what is in them, the words for several methods, and a method of one's own."""

import inspect
import subprocess
import sys

import pytest
import torch

from more_hf_bench.errors import BenchmarkError
from more_hf_bench.methods.registry import (
    CLASSIFICATION,
    DIFFUSION,
    UNREGISTERED,
    classification_groups,
    diffusion_groups,
    find_classification_method,
    find_diffusion_method,
    methods_that_forget,
)


def test_importing_the_registry_imports_nothing_heavy():
    light = "import sys, more_hf_bench.methods.registry; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True)


def test_groups():
    pictures, classes = diffusion_groups(), classification_groups("classes")
    samples = classification_groups("samples")
    assert list(DIFFUSION) == pictures["all"] + pictures["appendix"]
    assert set(pictures["all"]) - set(pictures["training-free"]) == {"esd", "ca"}
    of_samples = ["remap-samples", "remap-samples-as-printed"]
    ablations = {"erase-without-complement", "remap-without-complement", "more-trained", "more-inner"}
    assert set(CLASSIFICATION) - set(classes["all"]) == {*of_samples, *ablations}
    assert set(methods_that_forget("classes")) == set(classes["all"]) | ablations
    assert samples["closed-form"] == ["original", "esc", *of_samples]
    assert {"finetune", "esc-t", "retrain"} <= set(samples["all"]) - set(classes["closed-form"])
    assert {"esc", "leace-rest", "erase", "more-hash"} < set(classes["closed-form"]) < set(classes["all"])


@pytest.mark.parametrize("name", DIFFUSION)
def test_every_method_for_pipelines_is_called_alike(name):
    parameters = inspect.signature(find_diffusion_method(name)).parameters
    assert list(parameters)[:2] == ["pipe", "concepts"]
    assert {"remap_to", "retain"} <= set(parameters)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(parameters.values())[2:])


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_every_method_for_classifiers_is_called_alike(name):
    parameters = inspect.signature(CLASSIFICATION[name].load()).parameters
    assert list(parameters)[:2] == ["model", "splits"]
    assert parameters["seed"].default == 0
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(parameters.values())[2:])


MODULE = """
def my_erase(pipe, concepts, *, remap_to, retain, strength=1.0):
    return pipe

def my_forget(model, splits, *, seed, **settings):
    return model

number = 3
"""


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    """A module in the working directory, which the interpreter does not search by itself."""
    (tmp_path / "module_of_mine.py").write_text(MODULE, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield "module_of_mine"
    sys.modules.pop("module_of_mine", None)


def test_ones_own_method(my_module):
    erase = find_diffusion_method(f"{my_module}:my_erase")
    model = torch.nn.Identity()
    assert erase(model, "a", remap_to=None, retain=None) is model
    forget = find_classification_method(f"{my_module}:my_forget", forgets="samples")
    assert forget(model, None, seed=0) is model
    assert DIFFUSION.get(f"{my_module}:my_erase", UNREGISTERED).targets == "one"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uec", "Did you mean uce"),
        ("zzzz", "There are: original, random-weights"),
        (":my_erase", "cannot be imported"),
        ("..module_of_mine:my_erase", "cannot be imported"),
        ("module_of_mime:my_erase", "cannot be imported.*module_of_mime"),
        ("module_of_mine:my_erse", "cannot be imported.*no attribute 'my_erse'"),
        ("module_of_mine:number", "not a callable"),
        ("module_of_mine:my_forget", "arguments.*seed.*remap_to, retain"),
    ],
)
def test_a_wrong_name_is_refused_with_what_is_wrong_and_what_to_do(my_module, name, message):
    with pytest.raises(BenchmarkError, match=f"(?s){message}"):
        find_diffusion_method(name)


def test_a_method_of_classes_is_none_of_samples():
    with pytest.raises(BenchmarkError, match="'more' that forgets samples.*There are: original"):
        find_classification_method("more", forgets="samples")
    with pytest.raises(BenchmarkError, match="'remap-samples' that forgets classes"):
        find_classification_method("remap-samples", forgets="classes")
