"""Whatever is passed: an error or the edit, and after an error the model is bit for bit what it was."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.compare import same, state
from support.pipelines import build_tiny_sd
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
TEXT = st.one_of(NAMES, st.text(max_size=12), ODD)
NAMED = st.one_of(
    TEXT,
    st.lists(TEXT, max_size=3),
    st.dictionaries(st.text(max_size=5), st.lists(TEXT, max_size=2), max_size=2),
)


def snapshot(model, core):
    erasure = more_hf.get_erasure(model)
    hooks = [(len(part._forward_pre_hooks), len(part._forward_hooks)) for part in core.modules()]
    flags = [part.training for part in core.modules()]
    return erasure, hooks, flags


def call(function, model, core):
    """
    The function's result or its error, after which the model must be what it was; else it is restored.
    """
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
        yield build_tiny_sd(
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            block_out_channels=(4,),
        )


OPTIONS = {
    "retain": NAMED,
    "num_experts": ODD,
    "router": st.one_of(st.sampled_from(["random", "hash", "prototype", "prototype_random"]), ODD),
    "solver": st.one_of(st.sampled_from(["pinv", "covariance", "auto"]), ODD),
    "seed": st.one_of(st.integers(), ODD),
}


@given(
    concepts=NAMED,
    remap_to=NAMED,
    options=st.fixed_dictionaries(
        {},
        optional={
            **OPTIONS,
            "tokens": st.one_of(st.sampled_from(["last", "end", "positions"]), ODD),
            "pooled": ODD,
        },
    ),
)
def test_erase_concept(pipe, concepts, remap_to, options):
    call(lambda: more_hf.erase_concept(pipe, concepts, remap_to=remap_to, **options), pipe, pipe.unet)


@given(
    option=st.sampled_from(
        ["concepts", "remap_to", "retain", "num_experts", "router", "solver", "seed", "tokens"]
    ),
    value=NAMED,
)
def test_erase_concept_with_one_odd_argument(pipe, option, value):
    arguments = {
        "concepts": "van gogh",
        "remap_to": "claude monet",
        "solver": "pinv",
        "tokens": "last",
        option: value,
    }
    call(lambda: more_hf.erase_concept(pipe, **arguments), pipe, pipe.unet)


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
LABELS = st.sampled_from(
    [
        lambda labels: labels,
        lambda labels: labels.tolist(),
        lambda labels: labels.numpy(),
        lambda labels: labels.to(torch.uint8),
        lambda labels: labels.float(),
        lambda labels: labels == 1,
        lambda labels: labels[:-1],
        lambda labels: labels[:, None],
        lambda labels: labels + 1,
        lambda labels: -labels,
        lambda labels: [str(label) for label in labels],
        lambda labels: None,
        lambda labels: 3,
        lambda labels: [10**30] * len(labels),
        lambda labels: nn.functional.one_hot(labels),
    ]
)
IMAGES = st.sampled_from(
    [
        lambda images: images,
        lambda images: images.numpy(),
        lambda images: images.tolist(),
        lambda images: images.double(),
        lambda images: images.half(),
        lambda images: images * 0,
        lambda images: images * math.nan,
        lambda images: images * math.inf,
        lambda images: images * 1e38,
        lambda images: images * 1e-40,
        lambda images: images.new_ones(images.shape),
        lambda images: (images * 50).to(torch.uint8),
        lambda images: [*images],
        lambda images: None,
        lambda images: "images",
        lambda images: images > 0,
    ]
)
BATCHES = st.sampled_from(
    [
        lambda images, labels: [(images, labels)],
        lambda images, labels: [[images, labels]],
        lambda images, labels: [{"pixel_values": images, "labels": labels}],
        lambda images, labels: [{"image": images, "label": labels}],
        lambda images, labels: [(images[:0], labels[:0]), (images, labels)],
        lambda images, labels: iter([(images[:12], labels[:12]), (images[12:], labels[12:])]),
        lambda images, labels: [(images[:0], labels[:0])],
        lambda images, labels: [{"images": images}],
        lambda images, labels: [images],
        lambda images, labels: images,
        lambda images, labels: [],
        lambda images, labels: None,
        lambda images, labels: 3,
        lambda images, labels: "data",
        lambda images, labels: [("a", "b")],
        lambda images, labels: ["ab"],
    ]
)


@given(batches=BATCHES, image=IMAGES, label=LABELS, solver=st.sampled_from(["pinv", "covariance", "auto"]))
def test_data_of_a_classifier(classifier, batches, image, label, solver):
    model, images, labels = classifier
    images, labels = image(images), label(labels)
    sliced = all(hasattr(part, "__getitem__") for part in (images, labels))
    data = batches(images, labels) if sliced else [(images, labels)]
    call(lambda: more_hf.collect_prototypes(model, data), model, model)
    call(lambda: more_hf.erase_classes(model, data, 0, remap_to=[1], solver=solver), model, model)


@given(
    forget=CLASSES,
    remap_to=st.one_of(CLASSES, st.just("remain")),
    options=st.fixed_dictionaries(
        {},
        optional={
            **{name: OPTIONS[name] for name in ("num_experts", "router", "solver", "seed")},
            "head": st.one_of(st.sampled_from(["2", "1", "0", ["2"]]), ODD),
            "at": st.one_of(st.sampled_from(["2", "1", "0"]), ODD),
        },
    ),
)
def test_erase_classes(classifier, forget, remap_to, options):
    model, images, labels = classifier
    call(
        lambda: more_hf.erase_classes(model, [(images, labels)], forget, remap_to=remap_to, **options),
        model,
        model,
    )


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
    found = more_hf.collect_prototypes(
        model, [(images[:0], labels[:0]), {"image": images.numpy(), "label": given_as}]
    )
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


FEATURES = st.sampled_from(
    [
        torch.eye(3).repeat(2, 1),
        torch.eye(4),
        torch.zeros(6, 3),
        torch.full((6, 3), math.nan),
        torch.eye(3).repeat(2, 1) * 1e300,
        torch.eye(3).repeat(2, 1) * math.inf,
        torch.tensor(1.0),
        torch.zeros(0, 3),
        torch.eye(3).repeat(2, 1).tolist(),
        torch.eye(3, dtype=torch.int64).repeat(2, 1),
        None,
    ]
)


@given(
    width=st.one_of(st.just(3), ODD),
    names=st.one_of(st.just(["a", "b", "c"]), ODD, st.lists(TEXT, max_size=3)),
    features=FEATURES,
    labels=st.one_of(
        st.just(torch.arange(6) % 3), ODD, LABELS.map(lambda change: change(torch.arange(6) % 3))
    ),
    forget=st.one_of(st.just(["a"]), NAMED),
    targets=st.one_of(st.just([["b"]]), ODD, st.lists(st.lists(TEXT, max_size=2), max_size=2)),
    solver=st.one_of(st.sampled_from(["pinv", "covariance"]), ODD),
    shrinkage=st.one_of(st.just(1e-4), ODD),
)
def test_prototypes_and_remap(width, names, features, labels, forget, targets, solver, shrinkage):
    def fit():
        fitter = PrototypeFitter(width, names)
        fitter.update(features, labels).update_moment(features)
        Remap.fit(fitter.prototypes, forget, targets, solver=solver, shrinkage=shrinkage)

    outcome_of(fit)


@given(targets=st.one_of(ODD, st.lists(st.lists(TEXT, max_size=2), max_size=2)), forget=NAMED, shrinkage=ODD)
def test_remap_of_good_prototypes(targets, forget, shrinkage):
    fitter = PrototypeFitter(4, ["cat", "dog", "x"])
    fitter.update(torch.eye(4)[:3], torch.arange(3)).update_moment(torch.eye(4))
    for arguments in ((forget, [["dog"]]), (["cat"], targets)):
        options = {"solver": "covariance", "shrinkage": shrinkage}
        outcome_of(partial(Remap.fit, fitter.prototypes, *arguments, **options))


HEADER = b"case_number,prompt,evaluation_seed,artist\n"
CONTENTS = {
    "binary": bytes(range(256)),
    "UTF-16": (HEADER + b"0,a cat,1,me\n").decode().encode("utf-16"),
    "a field of 200 kB": HEADER + b"0," + b"a" * 200_000 + b",1,me\n",
    "5,000 digits": HEADER + b"9" * 5000 + b",a cat,1,me\n",
    "a seed of 5,000 digits": HEADER + b"0,a cat," + b"9" * 5000 + b",me\n",
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


@given(content=st.binary(max_size=60), header=st.booleans())
def test_files_of_any_bytes(tmp_path_factory, content, header):
    path = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    path.write_bytes((HEADER if header else b"") + content)
    for read in (read_prompts, read_targets):
        outcome_of(partial(read, path))


@pytest.mark.parametrize("source", ["a" * 5000, "\0", "\ud800", "."])
def test_files_that_are_not_there(source):
    with pytest.raises(more_hf.MoreError):
        read_prompts(source)
