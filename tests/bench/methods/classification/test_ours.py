"""Ours under the names of the tables."""

import copy

import pytest
import torch
from support.compare import same, state
from support.squares import FORGET, K, all_of, head_inputs, pixels

from more_hf.api import get_erasure
from more_hf.classification.erase import erase_classes
from more_hf_bench.methods.classification.router_training import train_router
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.splits import ImageSet, KDData, split_by_sample


@pytest.mark.parametrize("name", ["remap", "more", "more-hash", "more-prototype", "erase"])
def test_ours_are_erase_classes(name, model, splits):
    """Asked for the same by hand; and the control, another seed or other targets, is another edit."""
    options = {
        "remap": {"num_experts": 1},
        "more": {"router": "random"},
        "more-hash": {"router": "hash"},
        "more-prototype": {"router": "prototype"},
        "erase": {"remap_to": None},
    }
    reference, other = copy.deepcopy(model), copy.deepcopy(model)
    images, labels = all_of(splits)
    erase_classes(reference, [(images, labels)], [FORGET], seed=2, **options[name])
    erase_classes(other, [(images, labels)], [FORGET], remap_to=[1])
    edited = CLASSIFICATION[name].load()(model, splits, seed=2)
    assert torch.allclose(edited[-1].weight, reference[-1].weight, atol=1e-6)
    assert not torch.allclose(edited[-1].weight, other[-1].weight, atol=1e-4)
    assert get_erasure(edited).router == options[name].get("router")


def test_a_trained_router_starts_as_the_untrained_one_and_moves(model, splits):
    settings = {"num_experts": 3, "losses": "forget+balance", "epochs": 2, "learning_rate": 0.1}
    start = CLASSIFICATION["more-prototype"].load()(copy.deepcopy(model), splits, num_experts=3)
    edited = CLASSIFICATION["more-trained"].load()(copy.deepcopy(model), splits, **settings)
    by_hand = copy.deepcopy(model)
    erase_classes(by_hand, [all_of(splits)], [FORGET], num_experts=3, router="prototype")
    training = train_router(
        by_hand, [all_of(splits)], losses=("forget", "balance"), epochs=2, learning_rate=0.1
    )
    weight = get_erasure(edited).hook.router.weight
    assert torch.allclose(weight, training.weight, atol=1e-4)
    assert not torch.allclose(weight, get_erasure(start).hook.router.weight, atol=1e-2)
    assert torch.equal(edited[-1].weight, start[-1].weight)  # nothing else is trained


def test_at_an_inner_module_the_weights_stay(model, splits):
    reference, before = copy.deepcopy(model), state(model)
    erase_classes(reference, [all_of(splits)], [FORGET], remap_to=None, at="3")
    at_head = CLASSIFICATION["more-inner"].load()(copy.deepcopy(model), splits)
    edited = CLASSIFICATION["more-inner"].load()(model, splits, at="3", remap_to=None, router=None)
    with torch.no_grad():
        assert torch.allclose(edited(pixels(splits.f)), reference(pixels(splits.f)), atol=1e-4)
    assert same(edited, before)
    assert get_erasure(edited).request.at == "3"
    assert not torch.equal(at_head[-1].weight, before["4.weight"])


def test_samples_go_where_the_others_of_their_class_are(model, splits):
    data = KDData("squares", tuple("abcd"), *[everything(splits)] * 3, channels=1, flip=False)
    drawn = split_by_sample(data, 0.2, seed=0)
    means = [
        torch.stack([head_inputs(model, one(s, c)).mean(0) for c in range(K)]) for s in (drawn.f, drawn.r)
    ]
    expected = means[1] @ model[-1].weight.double().T
    assert (means[0] @ model[-1].weight.double().T - expected).abs().max() > 1e-2
    edited = CLASSIFICATION["remap-samples"].load()(copy.deepcopy(model), drawn)
    assert torch.allclose(means[0] @ edited[-1].weight.double().T, expected, atol=1e-4)
    printed = CLASSIFICATION["remap-samples-as-printed"].load()(copy.deepcopy(model), drawn)
    assert not torch.allclose(means[0] @ printed[-1].weight.double().T, expected, atol=1e-3)


def everything(splits):
    images = splits.f.images
    return ImageSet(images, torch.arange(len(images)) % K, torch.arange(len(images)), image_size=5)


def one(images, label):
    return images.subset(images.labels == label)
