"""Whatever is passed: an error or the edit, and after an error the model is bit for bit what it was."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.compare import same, state
from support.pipelines import ONE_ATTENTION, build_tiny_sd
from support.texts import CHARACTERS
from torch import nn

import more_hf
from more_hf.core.prototypes import PrototypeFitter
from more_hf.core.remap import Remap
from more_hf_bench.artists.prompts import read_prompts, read_targets


pytestmark = pytest.mark.usefixtures("one_thread")

ODD = st.sampled_from(
    [None, True, 0, -1, 1.5, math.nan, math.inf, "", " ", "{}", "é", "van gogh", "cat" * 200, "9"]
    + [[], (), {}, [None], [["cat"]], {"cat": None}, {"cat": "dog"}, {1: 2}, range(3), [3.0], ["cat", None]]
    + [object(), torch.tensor([0, 1]), np.array(["cat"]), np.int64(1)]
)
NAMES = st.sampled_from(["van gogh", "pablo picasso", "andy warhol", "cat", "claude monet"])
TEXT = st.one_of(NAMES, st.text(CHARACTERS, max_size=12), ODD)
NAMED = st.one_of(
    TEXT,
    st.lists(TEXT, max_size=3),
    st.dictionaries(st.text(CHARACTERS, max_size=5), st.lists(TEXT, max_size=2), max_size=2),
)


def snapshot(model, core):
    erasure = more_hf.get_erasure(model)
    hooks = [(len(part._forward_pre_hooks), len(part._forward_hooks)) for part in core.modules()]
    flags = [part.training for part in core.modules()]
    return erasure, hooks, flags


def call(function, model, core):
    """The result or the error, after which the model must be what it was; else it is restored."""
    found, before = snapshot(model, core), state(core)
    outcome = outcome_of(function)
    if isinstance(outcome, Exception):
        assert snapshot(model, core) == found, outcome
    elif more_hf.get_erasure(model) is not None:
        more_hf.restore(model)
    assert same(core, before), outcome
    return outcome


def outcome_of(function):
    """The function's result, or its error: one of ours with a message to read, or what Python says."""
    try:
        return function()
    except (more_hf.MoreError, ValueError, TypeError) as error:
        outcome = error
    assert str(outcome)
    assert len(str(outcome)) < 3000
    return outcome


@pytest.fixture(scope="module")
def pipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("more_hf.diffusion.ordinary.everyday_prompts", lambda tokenizer: ("a dog and a tree",))
        yield build_tiny_sd(**ONE_ATTENTION)


ROUTERS = st.sampled_from(["random", "hash", "prototype", "prototype_random"]) | ODD
SOLVERS = st.sampled_from(["pinv", "covariance", "auto"]) | ODD
OPTIONS = {"num_experts": ODD, "router": ROUTERS, "solver": SOLVERS, "seed": st.integers() | ODD}
TOKENS = st.sampled_from(["last", "end", "positions"]) | ODD


def options(**more):
    return st.fixed_dictionaries({}, optional={**OPTIONS, **more})


@given(concepts=NAMED, remap_to=NAMED, options=options(retain=NAMED, tokens=TOKENS, pooled=ODD))
def test_erase_concept(pipe, concepts, remap_to, options):
    call(lambda: more_hf.erase_concept(pipe, concepts, remap_to=remap_to, **options), pipe, pipe.unet)


@given(option=st.sampled_from(["concepts", "remap_to", "retain", "tokens", *OPTIONS]), value=NAMED)
def test_erase_concept_with_one_odd_argument(pipe, option, value):
    good = {"concepts": "van gogh", "remap_to": "claude monet", "solver": "pinv", "tokens": "last"}
    call(lambda: more_hf.erase_concept(pipe, **{**good, option: value}), pipe, pipe.unet)


@pytest.mark.slow
@given(value=NAMED)
def test_restore_of_a_pipeline(pipe, value):
    call(lambda: more_hf.restore(pipe, value), pipe, pipe.unet)
    original = state(pipe.unet)
    more_hf.erase_concept(pipe, "van gogh", remap_to="claude monet", solver="pinv", tokens="last")
    erased = state(pipe.unet)
    outcome = outcome_of(lambda: more_hf.restore(pipe, value))
    assert same(pipe.unet, erased if isinstance(outcome, Exception) else original)
    if isinstance(outcome, Exception):
        more_hf.restore(pipe)


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 4))
        return model, torch.randn(24, 1, 2, 4), torch.arange(24) % 4


CLASSES = st.one_of(ODD, st.integers(-2, 5), st.lists(st.one_of(ODD, st.integers(0, 4)), max_size=3))
# What a data loader may give, by what is done to the images, to the labels, and to both
IMAGES = {
    "as they are": lambda images: images,
    "a list": lambda images: images.tolist(),
    "half": lambda images: images.half(),
    "zero": lambda images: images * 0,
    "NaN": lambda images: images * math.nan,
    "huge": lambda images: images * 1e38,
    "bytes": lambda images: (images * 50).to(torch.uint8),
    "none": lambda images: None,
    "a mask": lambda images: images > 0,
}
LABELS = {
    "as they are": lambda labels: labels,
    "a list": lambda labels: labels.tolist(),
    "bytes": lambda labels: labels.to(torch.uint8),
    "floats": lambda labels: labels.float(),
    "a mask": lambda labels: labels == 1,
    "too few": lambda labels: labels[:-1],
    "a column": lambda labels: labels[:, None],
    "negative": lambda labels: -labels,
    "words": lambda labels: [str(label) for label in labels],
    "none": lambda labels: None,
}
BATCHES = {
    "a pair": lambda images, labels: [(images, labels)],
    "a dictionary": lambda images, labels: [{"pixel_values": images, "labels": labels}],
    "an empty one first": lambda images, labels: [(images[:0], labels[:0]), (images, labels)],
    "an iterator": lambda images, labels: iter([(images[:12], labels[:12]), (images[12:], labels[12:])]),
    "no labels": lambda images, labels: [{"images": images}],
    "no pair": lambda images, labels: [images],
    "no batch": lambda images, labels: images,
    "nothing": lambda images, labels: [],
    "text": lambda images, labels: "data",
}


def one_of(changes):
    return st.sampled_from(list(changes.values()))


@given(one_of(BATCHES), one_of(IMAGES), one_of(LABELS), st.sampled_from(["pinv", "covariance", "auto"]))
def test_data_of_a_classifier(classifier, batches, image, label, solver):
    model, images, labels = classifier
    images, labels = image(images), label(labels)
    sliced = all(hasattr(part, "__getitem__") for part in (images, labels))
    data = batches(images, labels) if sliced else [(images, labels)]
    call(lambda: more_hf.collect_prototypes(model, data), model, model)
    call(lambda: more_hf.erase_classes(model, data, 0, remap_to=[1], solver=solver), model, model)


HEADS, INNER = st.sampled_from(["2", "1", "0", ["2"]]) | ODD, st.sampled_from(["2", "1", "0"]) | ODD


@given(forget=CLASSES, remap_to=CLASSES | st.just("remain"), options=options(head=HEADS, at=INNER))
def test_erase_classes(classifier, forget, remap_to, options):
    model, images, labels = classifier
    data = [(images, labels)]
    call(lambda: more_hf.erase_classes(model, data, forget, remap_to=remap_to, **options), model, model)


def test_a_mask_does_not_name_class_one(classifier):
    model, images, labels = classifier
    for mask in ([True], torch.tensor([False, True, False, False]), True, [3.0]):
        error = call(lambda mask=mask: more_hf.erase_classes(model, [(images, labels)], mask), model, model)
        assert isinstance(error, more_hf.PrototypeError), mask


@pytest.mark.parametrize("forget", [torch.tensor([3, 1]), np.array([3, 1]), {3, 1}, ["3", 1]])
def test_what_names_classes(classifier, forget):
    model, images, labels = copy.deepcopy(classifier)
    more_hf.erase_classes(model, [(images, labels)], forget, remap_to=[0])
    assert sorted(more_hf.get_erasure(model).concepts) == ["1", "3"]


@pytest.mark.parametrize("change", [list, torch.Tensor.numpy, lambda labels: labels.to(torch.uint8)])
def test_what_holds_labels(classifier, change):
    model, images, labels = classifier
    expected = more_hf.collect_prototypes(model, [(images, labels)])
    given_as = change(labels) if change is not list else labels.tolist()
    batches = [(images[:0], labels[:0]), {"image": images.numpy(), "label": given_as}]
    found = more_hf.collect_prototypes(model, batches)
    assert torch.equal(found.matrix, expected.matrix)


@given(
    value=ODD,
    name=st.sampled_from(["restore", "get_erasure", "disabled", "routing", "erase_concept", "erase_classes"]),
)
def test_what_is_no_model(value, name):
    def enter():
        arguments = {"routing": ([1],), "erase_concept": ("cat",), "erase_classes": ([], 0)}.get(name, ())
        options = {"remap_to": "dog"} if name == "erase_concept" else {}
        result = getattr(more_hf, name)(value, *arguments, **options)
        if name in ("disabled", "routing"):
            result.__enter__()

    with pytest.raises((more_hf.MoreError, TypeError)):
        enter()


def test_the_denoiser_is_no_classifier(tiny_sd):
    pipe = more_hf.erase_concept(tiny_sd(), "van gogh", remap_to="claude monet", solver="pinv")
    for verb in (more_hf.restore, more_hf.get_erasure, lambda unet: more_hf.disabled(unet).__enter__()):
        with pytest.raises(more_hf.MoreError, match="Pass the pipeline"):
            verb(pipe.unet)


@given(seeds=st.one_of(ODD, st.lists(st.one_of(st.integers(), ODD), max_size=3)))
def test_routing(classifier, seeds):
    model, images, labels = copy.deepcopy(classifier)
    more_hf.erase_classes(model, [(images, labels)], 0, router="random")
    before = state(model)

    def route():
        with more_hf.routing(model, seeds):
            model(images)

    outcome_of(route)
    assert same(model, before)
    assert more_hf.get_erasure(model).hook.router.seeds is None


GOOD = torch.eye(3).repeat(2, 1)
FEATURES = [GOOD, math.nan * GOOD, 1e300 * GOOD, GOOD.long(), 0 * GOOD, GOOD[:0], GOOD[:, :2], None]


@given(
    width=st.just(3) | ODD,
    names=st.one_of(st.just(["a", "b", "c"]), ODD, st.lists(TEXT, max_size=3)),
    features=st.sampled_from(FEATURES),
    label=one_of(LABELS),
    forget=st.just(["a"]) | NAMED,
    targets=st.one_of(st.just([["b"]]), ODD, st.lists(st.lists(TEXT, max_size=2), max_size=2)),
    solver=st.sampled_from(["pinv", "covariance"]) | ODD,
    shrinkage=st.just(1e-4) | ODD,
)
def test_prototypes_and_remap(width, names, features, label, forget, targets, solver, shrinkage):
    def fit():
        fitter = PrototypeFitter(width, names)
        fitter.update(features, label(torch.arange(6) % 3)).update_moment(features)
        Remap.fit(fitter.prototypes, forget, targets, solver=solver, shrinkage=shrinkage)

    outcome_of(fit)


HEADER = b"case_number,prompt,evaluation_seed,artist\n"
CONTENTS = {
    "binary": bytes(range(256)),
    "UTF-16": (HEADER + b"0,a cat,1,me\n").decode().encode("utf-16"),
    "an open quote": HEADER + b'0,"a cat,1,me\n',
    "nothing": b"",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("read", [read_prompts, read_targets])
def test_files(tmp_path, content, read):
    path = tmp_path / "prompts.csv"
    path.write_bytes(CONTENTS[content])
    with pytest.raises(more_hf.MoreError):
        read(path)
