"""Ours under the names of the tables, without prototype orthogonalization and without the complement term."""

import copy

import pytest
import torch
from support.compare import same, state
from support.squares import FORGET, K, all_of, head_inputs, pixels, remaining, unlearn

from more_hf.api import get_erasure
from more_hf.classification.erase import erase_classes
from more_hf.core.errors import MoreError
from more_hf_bench.methods.classification.router_training import train_router
from more_hf_bench.splits import ImageSet, KDData, split_by_class, split_by_sample


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
    edited = unlearn(name, model, splits, seed=2)
    assert torch.allclose(edited[-1].weight, reference[-1].weight, atol=1e-6)
    assert not torch.allclose(edited[-1].weight, other[-1].weight, atol=1e-4)
    assert get_erasure(edited).router == options[name].get("router")


@pytest.mark.parametrize("num_experts", [None, 40])
def test_the_papers_more_is_algorithm_1(num_experts, model, splits):
    """Two classes forgotten, each with its own draws: the mean of E = I + (P_t − P_F) P⁺ is in the head."""
    data = KDData("squares", tuple("abcd"), *[everything(splits)] * 3, channels=1, flip=False)
    drawn = split_by_class(data, [1, FORGET])
    images, labels = pixels(data.train), data.train.labels
    P = torch.stack([model.eval()[:-1](images[labels == c]).double().mean(0) for c in range(K)], dim=1)
    edited = unlearn("more-paper", model, drawn, seed=5, num_experts=num_experts)
    erasure = get_erasure(edited)
    (remap,) = erasure.remaps.values()
    targets = [[int(remap.prototypes.names[i]) for i in expert] for expert in remap.targets.tolist()]
    assert remap.prototypes.names == tuple("0123")
    assert len(targets) == (num_experts or 2)
    assert {target for expert in targets for target in expert} <= {0, 3}
    D = torch.linalg.pinv(P)[[1, FORGET]]
    shift = torch.stack([P[:, expert] for expert in targets]).mean(0) - P[:, [1, FORGET]]
    W = model[-1].weight.double()
    assert torch.allclose(edited[-1].weight.double(), W + W @ shift @ D, atol=1e-4)
    assert not torch.allclose(edited[-1].weight.double(), W, atol=1e-2)
    assert (erasure.router, erasure.facts.solver) == ("random", "pinv")
    if num_experts == 40:  # of 40 pairs from two classes, drawn independently, all four come
        assert len(set(map(tuple, targets))) == 4


def test_the_papers_targets_are_drawn_with_repeats(model, splits):
    """One class to three others in three experts: all three are different in 6 of 27 draws."""
    distinct = 0
    for seed in range(30):
        (remap,) = get_erasure(unlearn("more-paper", model, splits, seed=seed)).remaps.values()
        distinct += len(set(remap.targets.flatten().tolist())) == 3
    assert abs(distinct - 30 * 6 / 27) < 4 * (30 * 6 / 27 * 21 / 27) ** 0.5


def test_a_trained_router_starts_as_the_untrained_one_and_moves(model, splits):
    settings = {"num_experts": 3, "losses": "forget+balance", "epochs": 2, "learning_rate": 0.1}
    start = unlearn("more-prototype", model, splits, num_experts=3)
    edited = unlearn("more-trained", model, splits, **settings)
    by_hand = copy.deepcopy(model)
    erase_classes(by_hand, [all_of(splits)], [FORGET], num_experts=3, router="prototype")
    asked = {**settings, "losses": ("forget", "balance")}
    del asked["num_experts"]
    train_router(by_hand, [all_of(splits)], **asked)
    weight = get_erasure(edited).hook.router.weight
    assert torch.allclose(weight, get_erasure(by_hand).hook.router.weight, atol=1e-4)
    assert not torch.allclose(weight, get_erasure(start).hook.router.weight, atol=1e-2)
    assert torch.equal(edited[-1].weight, start[-1].weight)  # nothing else is trained


def test_at_an_inner_module_the_weights_stay(model, splits):
    reference, before = copy.deepcopy(model), state(model)
    erase_classes(reference, [all_of(splits)], [FORGET], remap_to=None, at="3")
    at_head = unlearn("more-inner", model, splits)
    edited = unlearn("more-inner", model, splits, at="3", remap_to=None, router=None)
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
    edited = unlearn("remap-samples", model, drawn)
    assert torch.allclose(means[0] @ edited[-1].weight.double().T, expected, atol=1e-4)
    printed = unlearn("remap-samples-as-printed", model, drawn)
    assert not torch.allclose(means[0] @ printed[-1].weight.double().T, expected, atol=1e-3)


def everything(splits):
    images = splits.f.images
    return ImageSet(images, torch.arange(len(images)) % K, torch.arange(len(images)), image_size=5)


def one(images, label):
    return images.subset(images.labels == label)


def prototypes(model, splits):
    """Means of the forgotten class and of classes 0, 1 and 3, as rows."""
    parts = [splits.f, *(remaining(splits, c) for c in (0, 1, 3))]
    return torch.stack([head_inputs(model, part).mean(0) for part in parts])


def test_without_po_moves_means_where_it_says(model, splits):
    P = prototypes(model, splits)
    erased = unlearn("erase-without-po", model, splits)
    mean = head_inputs(erased, splits.f).mean(0)
    assert mean.norm() < 1e-5 * P[0].norm()
    remapped = unlearn("remap-without-po", model, splits, target=1)
    assert torch.allclose(head_inputs(remapped, splits.f).mean(0), P[2], atol=1e-4)
    moved = head_inputs(remapped, remaining(splits, 3)).mean(0) - P[3]
    expected = (P[2] - P[0]) * (P[0] @ P[3]) / (P[0] @ P[0])  # what orthogonalisation would prevent
    assert torch.allclose(moved, expected, atol=1e-4)
    assert expected.norm() > 0.05 * P[3].norm()
    with pytest.raises(MoreError, match="Class 9 is not among the remaining classes"):
        unlearn("remap-without-po", model, splits, target=9)


def test_without_complement_nothing_is_left_beside_the_prototypes(model, splits):
    P = prototypes(model, splits).T
    whole = model[:-1](pixels(splits.r)).double()
    for name, settings, forget_to in (("erase", {}, 0 * P[:, 0]), ("remap", {"target": 1}, P[:, 2])):
        edited = unlearn(f"{name}-without-complement", model, splits, **settings)
        assert torch.allclose(head_inputs(edited, splits.f).mean(0), forget_to, atol=1e-4)
        for i, c in enumerate((0, 1, 3), 1):
            mean = head_inputs(edited, remaining(splits, c)).mean(0)
            assert torch.allclose(mean, P[:, i], atol=1e-4)  # PO spares the others
        # coordinates of remaining samples, by least squares instead of a pseudo-inverse
        coordinates = torch.linalg.lstsq(P, whole.T).solution
        coordinates[0], forgotten = 0, coordinates[0].clone()
        expected = P @ coordinates + forget_to[:, None] * forgotten
        assert torch.allclose(head_inputs(edited, splits.r), expected.T, atol=1e-4)
        assert torch.linalg.matrix_rank(head_inputs(edited, splits.r), rtol=1e-4) == 3
    assert torch.linalg.matrix_rank(whole, rtol=1e-4) > 3
    with pytest.raises(MoreError, match="Class 2 is not among the remaining classes"):
        unlearn("remap-without-complement", model, splits, target=2)
