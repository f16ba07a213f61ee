"""What cannot be forgotten as asked is refused before anything is changed; and how an edit is undone."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from support.compare import accuracies, same, state
from torch import nn

import more_hf
from more_hf import AlreadyErasedError, IncompatibleBaseError, MoreError, PrototypeError, SiteNotFoundError


HEAD = "classifier.1"


# Bad input, refused before anything is changed


def without_labels(images, labels):
    return [images]


def fewer_labels(images, labels):
    left = iter([labels])
    for part in (images[:300], images[300:]):
        yield part, next(left)[: len(part)]


def without_seven(images, labels):
    return [(images[labels != 7], labels[labels != 7])]


def beyond(images, labels):
    return [(images, labels + 5)]


def one_without_a_number(images, labels):
    return [(torch.where(torch.arange(len(images))[:, None, None, None] == 7, torch.nan, images), labels)]


def everything(images, labels):
    return [(images, labels)]


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (everything, {"forget": "fuor"}, r"no class 'fuor'. Did you mean 'four'"),
        (everything, {"forget": 10}, "no class 10"),
        (everything, {"forget": 4.0}, "names or whole numbers of classes, got 4.0"),
        (everything, {"forget": []}, "`forget` is empty"),
        (everything, {"forget": [4, "four"]}, "'four' is in `forget` twice"),
        (everything, {"forget": list(range(10))}, "`forget` has all 10 classes"),
        (everything, {"forget": 4, "remap_to": ["five", "four"]}, "'four' is both in `forget` and in"),
        (everything, {"forget": 4, "remap_to": []}, "`remap_to` is empty"),
        (everything, {"forget": 4, "remap_to": "tree"}, "no class 'tree'"),
        (everything, {"forget": 4, "num_experts": 0}, "`num_experts` must be at least 1, got 0"),
        (everything, {"forget": 4, "router": "best"}, "Unknown router 'best'"),
        (everything, {"forget": 4, "solver": "lsq"}, "Unknown solver 'lsq'"),
        (everything, {"forget": 4, "solver": "soft"}, "Unknown solver 'soft'"),
        (without_labels, {"forget": 4}, "The data has no labels"),
        (fewer_labels, {"forget": 4}, "labels that are fewer than the samples"),
        (without_seven, {"forget": 4}, "No feature was seen for 'seven'"),
        (beyond, {"forget": 4}, "Label 14 has no name"),
        (one_without_a_number, {"forget": 4}, "are NaN or infinite"),
        (everything, {"forget": 4, "head": "resnet"}, "is not a linear layer"),
        (everything, {"forget": 4, "at": "nowhere"}, "no module 'nowhere'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input(model, digits, data, arguments, message):
    before = state(model)
    with pytest.raises((PrototypeError, SiteNotFoundError), match=message):
        more_hf.erase_classes(model, data(*digits), **arguments)
    assert same(model, before)
    assert more_hf.get_erasure(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_model_whose_samples_have_no_one_class_is_refused(model, loader, problem):
    before = state(model)
    model.config.problem_type = problem
    with pytest.raises(SiteNotFoundError, match=f"says '{problem}'"):
        more_hf.erase_classes(model, loader, "four")
    assert same(model, before)
    model.config.problem_type = "single_label_classification"
    more_hf.erase_classes(model, loader, "four")
    assert not same(model, before)


class TwoHeads(nn.Module):
    """Ten digits and two parities of the same features; the first are what a call returns."""

    def __init__(self):
        super().__init__()
        self.flat, self.digit, self.parity = nn.Flatten(), nn.Linear(64, 10), nn.Linear(64, 2)

    def forward(self, images):
        features = self.flat(images)
        self.seen = self.parity(features)
        return self.digit(features)


def test_of_two_heads_the_one_with_the_class(digits):
    model = TwoHeads()
    before = state(model)
    with pytest.raises(SiteNotFoundError, match="do not have the same classes"):
        more_hf.erase_classes(model, [digits], 4, head=["digit", "parity"])
    assert same(model, before)
    more_hf.erase_classes(model, [digits], 4, most_lost=100)
    assert more_hf.get_erasure(model).request.head == ("digit",)
    assert torch.equal(model.parity.weight, before["parity.weight"])


def test_names_are_checked_before_the_pass(model, digits):
    def endless():
        yield digits
        pytest.fail("the second batch was asked for")

    with pytest.raises(PrototypeError, match="no class 'fuor'"):
        more_hf.erase_classes(model, endless(), "fuor")


def test_prototypes_of_another_model_or_without_the_class(model, prototypes):
    with pytest.raises(PrototypeError, match="32 features"):
        more_hf.erase_classes(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), prototypes, 4, head="1")
    with pytest.raises(PrototypeError, match="no prototype 'four'"):
        more_hf.erase_classes(model, prototypes.without(["four"]), "four")


def test_a_shared_or_quantized_head_is_refused(model, prototypes):
    model.tied = nn.Linear(32, 10)
    model.tied.weight = model.classifier[1].weight
    with pytest.raises(SiteNotFoundError, match="is shared by"):
        more_hf.erase_classes(model, prototypes, "four")

    class Quantized(nn.Linear):
        pass

    model.classifier[1] = Quantized(32, 10)
    with pytest.raises(SiteNotFoundError, match="quantized or wrapped"):
        more_hf.erase_classes(model, prototypes, "four")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_it_is_edited(model, digit_classifier, loader, digits, tmp_path, where):
    if where == "memory":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, torch.device("cpu"))
    more_hf.erase_classes(model, loader, "four", remap_to="nine")
    assert model.classifier[1].weight.is_meta
    resident = more_hf.erase_classes(copy.deepcopy(digit_classifier), loader, "four", remap_to="nine")
    torch.testing.assert_close(model(digits[0][:9]).logits, resident(digits[0][:9]).logits)
    with torch.no_grad(), more_hf.disabled(model):
        torch.testing.assert_close(model(digits[0][:9]).logits, digit_classifier(digits[0][:9]).logits)


def test_the_proof_by_run_rolls_back(model, prototypes):
    before = state(model)
    keep, head = copy.deepcopy(model.classifier[1]), model.classifier[1]
    # a branch beside it
    handle = head.register_forward_hook(lambda module, args, output: output + keep(args[0]))
    with pytest.raises(SiteNotFoundError, match="proof by run failed"):
        more_hf.erase_classes(model, prototypes, "four", head=HEAD)
    assert same(model, before)
    assert more_hf.get_erasure(model) is None
    assert not model.classifier[1]._forward_pre_hooks
    handle.remove()
    proof = more_hf.get_erasure(more_hf.erase_classes(model, prototypes, "four")).proof
    assert proof["layer_error"] < 4 < proof["layer_changed"]
    assert proof["expert_error"] < 4


# Undoing and adding


def test_a_second_call_fits_both_jointly(model, loader, digits, digit_classifier):
    more_hf.erase_classes(model, loader, "four", remap_to="nine", router="random", num_experts=2)
    more_hf.erase_classes(model, loader, "seven", remap_to="one")
    joint = more_hf.erase_classes(copy.deepcopy(digit_classifier), loader, ["four", "seven"], remap_to="nine")

    erasure = more_hf.get_erasure(model)
    assert erasure.concepts == ["four", "seven"]
    assert erasure.facts.sent_to == {"four": ["nine"], "seven": ["one"]}
    torch.testing.assert_close(erasure.remap.D_F, more_hf.get_erasure(joint).remap.D_F, rtol=1e-4, atol=1e-5)
    assert len(model.classifier[1]._forward_pre_hooks) == 1
    assert (accuracies(model, digits)[[4, 7]] == 0).all()
    with pytest.raises(PrototypeError, match="'nine' is both"):
        more_hf.erase_classes(model, loader, "nine", remap_to="one")  # four goes there
    with pytest.raises(MoreError, match="jointly"):
        more_hf.erase_classes(model, loader, "nine", at="resnet.encoder")
    assert more_hf.get_erasure(model) is erasure

    more_hf.restore(model, "seven")
    alone = more_hf.erase_classes(copy.deepcopy(digit_classifier), loader, "four", remap_to="nine")
    torch.testing.assert_close(model.classifier[1].weight, alone.classifier[1].weight, rtol=1e-5, atol=1e-6)
    assert same(more_hf.restore(model, [4]), digit_classifier.state_dict())


def test_restore_and_disabled(model, loader, digits):
    before, images = state(model), digits[0][:20]
    with pytest.raises(MoreError, match="Nothing was erased"):
        more_hf.restore(model)
    with pytest.raises(MoreError, match="Nothing was erased"), more_hf.disabled(model):
        pass
    logits = model(images).logits
    more_hf.erase_classes(model, loader, "four", router="hash")
    erased = model(images).logits
    with more_hf.disabled(model):
        assert torch.equal(model(images).logits, logits)
    assert torch.equal(model(images).logits, erased)
    with pytest.raises(MoreError, match="'five' was not erased"):
        more_hf.restore(model, "five")

    assert more_hf.restore(model) is model
    assert same(model, before)
    assert torch.equal(model(images).logits, logits)
    assert more_hf.get_erasure(model) is None
    assert not model.classifier[1]._forward_pre_hooks


def test_routing_needs_a_router(model, prototypes):
    more_hf.erase_classes(model, prototypes, "four")
    with pytest.raises(MoreError, match="no router"), more_hf.routing(model, seeds=[0]):
        pass


def test_a_trained_head_is_not_overwritten(model, prototypes):
    more_hf.erase_classes(model, prototypes, "four")
    with torch.no_grad():
        model.classifier[1].weight += 0.01
    with pytest.raises(IncompatibleBaseError, match="changed since the edit"):
        more_hf.restore(model)
    with pytest.raises(IncompatibleBaseError, match="changed since the edit"):
        more_hf.erase_classes(model, prototypes, "five")


def test_without_originals(model, prototypes):
    more_hf.erase_classes(model, prototypes, "four", keep_originals=False)
    with pytest.raises(AlreadyErasedError, match="not available"):
        more_hf.restore(model)
