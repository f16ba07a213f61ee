"""`erase_classes`: what it does to a real classifier, what it says about it, and how it is undone."""

import copy

import pytest
import torch
from support.classifiers import token_classifier
from support.compare import accuracies, changed, same, state
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

import more_hf
from more_hf import PrototypeError, SiteNotFoundError
from more_hf.classification.features import features_of


HEAD = "classifier.1"


# What it does


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"remap_to": None},
        {"remap_to": ["nine", 0]},
        {"num_experts": 5, "router": "random"},
        {"router": "hash"},
        {"router": "prototype"},
        {"solver": "covariance"},
    ],
    ids=str,
)
def test_the_class_is_forgotten_and_the_others_are_not(model, loader, digits, settings):
    before = accuracies(model, digits)
    assert more_hf.erase_classes(model, loader, "four", **settings) is model
    after = accuracies(model, digits)
    rest = [i for i in range(10) if i != 4]

    assert before[4] > 90
    assert after[4] < 5
    assert after[rest].mean() > before[rest].mean() - 1.5
    more_hf.restore(model)
    assert torch.equal(accuracies(model, digits), before)


def test_only_the_heads_weight_changes_and_its_feature_is_routed(model, loader, digits):
    before, images = state(model), digits[0][1200:]
    more_hf.erase_classes(model, loader, ["four", 7], remap_to=["nine"])
    remap = more_hf.get_erasure(model).remap

    assert changed(model, before) == {f"{HEAD}.weight"}
    weight = before[f"{HEAD}.weight"].double()
    expected = (weight + weight @ remap.shift() @ remap.D_F).float()
    torch.testing.assert_close(model.classifier[1].weight, expected, rtol=1e-6, atol=1e-7)
    # the hook on top of the merged head gives the original head on the routed feature
    with torch.no_grad():
        z = model.resnet(images).pooler_output.flatten(1)
        logits = nn.functional.linear(remap.apply(z), before[f"{HEAD}.weight"], before[f"{HEAD}.bias"])
        torch.testing.assert_close(model(images).logits, logits, rtol=1e-4, atol=1e-4)
        plain = nn.functional.linear(z, before[f"{HEAD}.weight"], before[f"{HEAD}.bias"])
    assert (plain - logits).abs().max() > 1


def test_every_expert_is_the_original_head_on_its_own_feature(model, loader, digits):
    head, images = copy.deepcopy(model.classifier), digits[0][:50]
    more_hf.erase_classes(model, loader, "four", router="random", num_experts=3)
    erasure = more_hf.get_erasure(model)
    with torch.no_grad():
        z = model.resnet(images).pooler_output
        with more_hf.routing(model, seeds=range(50)):
            experts = erasure.hook.router(z.flatten(1))
        with more_hf.routing(model, seeds=range(50)):
            routed = model(images).logits
        again = model(images).logits
        expected = head(erasure.remap.apply(z.flatten(1), experts)[:, :, None, None])

    assert len(experts.unique()) == 3
    torch.testing.assert_close(routed, expected, rtol=1e-4, atol=1e-4)
    assert (again - routed).abs().max() > 0.1  # outside, the next call draws anew


def test_targets_without_replacement_until_used_up(model, prototypes):
    more_hf.erase_classes(model, prototypes, "four", router="random")
    sent = more_hf.get_erasure(model).facts.sent_to["four"]
    assert sorted(sent) == sorted(set(prototypes.names) - {"four"})
    more_hf.restore(model)

    more_hf.erase_classes(model, prototypes, ["four", "one"], router="random", num_experts=16)
    counts = more_hf.get_erasure(model).remap.targets.T
    assert all(sorted(row[:8].tolist()) == sorted(row[8:].tolist()) for row in counts)
    assert all(len(set(row[:8].tolist())) == 8 for row in counts)
    assert 4 not in counts
    assert 1 not in counts


def test_by_default_a_class_goes_to_the_mean_of_all_that_remain(model, prototypes):
    more_hf.erase_classes(model, prototypes, ["four", "one"])
    erasure = more_hf.get_erasure(model)
    remain = [i for i, name in enumerate(prototypes.names) if name not in ("four", "one")]
    centroid = prototypes.matrix[:, remain].mean(1)

    for name in ("four", "one"):
        torch.testing.assert_close(erasure.remap.apply(prototypes[name]), centroid, rtol=1e-9, atol=1e-9)
        first = ", ".join(erasure.facts.sent_to[name][:5])
        assert f"{name} → the mean of {first}, 3 more" in erasure.to_markdown()
    assert erasure.facts.num_experts == 8
    assert erasure.guarantees == erasure.remap.verify(mean_only=True)
    torch.testing.assert_close(erasure.remap.shift(), erasure.remap.shifts.mean(0))


def test_seed_draws_the_targets(model, prototypes):
    def target(seed):
        more_hf.erase_classes(model, prototypes, "four", num_experts=1, seed=seed)
        sent = more_hf.get_erasure(model).facts.sent_to["four"]
        more_hf.restore(model)
        return tuple(sent)

    state = torch.random.get_rng_state()
    assert target(1) == target(1)
    assert len({target(seed) for seed in range(8)}) > 2
    assert torch.equal(torch.random.get_rng_state(), state)


def test_prototypes_in_place_of_a_loader(model, digit_classifier, loader, prototypes, tmp_path):
    prototypes.save(tmp_path / "prototypes.safetensors")
    more_hf.erase_classes(model, more_hf.Prototypes.load(tmp_path / "prototypes.safetensors"), "four")
    other = more_hf.erase_classes(copy.deepcopy(digit_classifier), loader, "four")

    torch.testing.assert_close(model.classifier[1].weight, other.classifier[1].weight, rtol=1e-4, atol=1e-5)


def test_all_of_the_arguments_are_in_the_record(model, prototypes):
    given = {"solver": "covariance", "num_experts": 4, "router": "hash", "seed": 3}
    more_hf.erase_classes(model, prototypes, [4], remap_to=["nine", "one"], **given)
    erasure = more_hf.get_erasure(model)

    names = {"concepts": {"four": ()}, "remap_to": {"four": ("nine", "one")}}
    assert erasure.request.to_dict() == {**names, **given, "head": (HEAD,), "at": None}
    assert erasure.to_dict()["sites"] == {HEAD: [10, 32]}
    report = erasure.to_markdown()
    for part in ("| forgotten | four |", "| router | hash |", "covariance: as asked for; 10 prototypes"):
        assert part in report
    assert max(erasure.facts.remain_moved, key=erasure.facts.remain_moved.get) in report


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(model, prototypes, digits, dtype):
    model.to(dtype)
    before = state(model)
    more_hf.erase_classes(model, prototypes, "four", router="random", num_experts=2)

    assert model.classifier[1].weight.dtype == dtype
    assert model(digits[0][:5].to(dtype)).logits.dtype == dtype
    assert same(more_hf.restore(model), before)


# Which solver


def test_more_classes_than_features_take_the_covariance_solver():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 1, 2, 4, generator=generator)
    labels = torch.arange(600) % 12
    images = centres[labels] + 0.3 * torch.randn(600, 1, 2, 4, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 12))
    with pytest.raises(PrototypeError, match="8 dimensions"):
        more_hf.erase_classes(model, [(images, labels)], [3], remap_to=[5], solver="pinv")
    more_hf.erase_classes(model, [(images, labels)], [3], remap_to=[5])
    erasure = more_hf.get_erasure(model)

    assert erasure.facts.solver == "covariance"
    assert "more classes than features" in erasure.to_markdown()
    assert erasure.guarantees["forget_to_target"] < 1e-10
    assert len(erasure.facts.remain_moved) == 10
    means = torch.stack([images[labels == i].flatten(1).double().mean(0) for i in range(12)])
    change = (erasure.remap.apply(means) - means).norm(dim=1) / means.norm(dim=1)
    moved = {str(i): float(change[i]) for i in range(12) if i not in (3, 5)}
    assert erasure.facts.remain_moved == pytest.approx(moved, rel=1e-4)
    assert "most of all " + max(moved, key=moved.get) in erasure.to_markdown()
    plain = more_hf.Prototypes(means.T, tuple(map(str, range(12))), torch.ones(12))
    with pytest.raises(PrototypeError, match="second moment"):
        more_hf.erase_classes(nn.Sequential(nn.Flatten(), nn.Linear(8, 12)), plain, [3], head="1")


def test_nearly_dependent_prototypes_take_the_covariance_solver(digits):
    images, labels = digits
    matrix = torch.eye(16, dtype=torch.float64)[:, :4] + 1
    matrix[:, 3] = matrix[:, 1] + matrix[:, 2] + 1e-7 * matrix[:, 3]
    moment = matrix @ matrix.T + torch.eye(16)
    dependent = more_hf.Prototypes(matrix, ("0", "1", "2", "3"), torch.ones(4), moment, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    more_hf.erase_classes(model, dependent, [1], remap_to=[0], head="1")

    assert more_hf.get_erasure(model).facts.solver == "covariance"
    assert "nearly dependent" in more_hf.get_erasure(model).to_markdown()


# Other heads


def test_two_heads_take_the_same_expert_of_their_own_features():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = token_classifier(DeiTForImageClassificationWithTeacher, DeiTConfig, num_labels=2)
        images, labels = 3 * torch.randn(80, 1, 8, 8), torch.arange(80) % 4
        images += 2 * torch.randn(4, 1, 8, 8)[labels]
        model.cls_classifier, model.distillation_classifier = nn.Linear(16, 4), nn.Linear(16, 4)
    before = copy.deepcopy(model)
    more_hf.erase_classes(model, [(images, labels)], [1], router="random")
    erasure = more_hf.get_erasure(model)

    assert list(erasure.sites) == ["cls_classifier", "distillation_classifier"]
    assert erasure.prototypes.matrix.shape == (32, 4)
    remaps = [erasure.remap_of(name) for name in erasure.sites]
    assert torch.equal(remaps[0].targets, remaps[1].targets)
    with torch.no_grad(), more_hf.routing(model, seeds=range(80)):
        logits = model(images).logits
        experts = erasure.hook.taken
        tokens = model.deit(images)[0]
        heads = (before.cls_classifier, before.distillation_classifier)
        parts = [head(remaps[i].apply(tokens[:, i], experts)) for i, head in enumerate(heads)]
        expected = sum(parts) / 2
    assert len(experts.unique()) == 3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (before(images).logits - logits).abs().max() > 0.01
    assert same(more_hf.restore(model), before.state_dict())


def test_an_own_module_with_its_head_named(digits):
    images, labels = digits

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.top = nn.Linear(64, 10)

        def forward(self, x):
            return self.top(x.flatten(1)).log_softmax(1)

    model = Own()
    with pytest.raises(SiteNotFoundError, match="No head found in Own"):
        more_hf.erase_classes(model, [(images, labels)], [4])
    more_hf.erase_classes(model, [(images, labels)], [4], head="top")
    assert more_hf.get_erasure(model).concepts == ["4"]
    assert list(more_hf.get_erasure(model).sites) == ["top"]
    more_hf.erase_classes(model, more_hf.get_erasure(model).prototypes, [5])  # the head is known by now
    assert more_hf.get_erasure(model).concepts == ["4", "5"]


def test_an_inner_module_is_a_hook_only_and_says_so(model, loader, digits, caplog):
    before, old = state(model), accuracies(model, digits)
    place = "resnet.encoder.stages.1"
    more_hf.erase_classes(model, loader, "four", remap_to=["one"], at=place)
    erasure = more_hf.get_erasure(model)

    assert f"by a hook on `{place}` only, not at rest" in caplog.text
    assert f"a hook on `{place}` only, **not erased at rest**" in erasure.to_markdown()
    assert same(model, before)
    # pooled over positions, the feature of a sample is what the expert makes of its mean: G1 at that place
    features, labels = map(torch.cat, zip(*features_of(model, loader, at=place), strict=True))
    mean = features[labels == 4].double().mean(0)
    torch.testing.assert_close(mean, erasure.prototypes["one"], rtol=1e-3, atol=1e-4)
    assert (erasure.prototypes["four"] - erasure.prototypes["one"]).abs().max() > 0.05
    assert not torch.equal(accuracies(model, digits), old)
    with more_hf.disabled(model):
        assert torch.equal(accuracies(model, digits), old)
    more_hf.restore(model)
    assert torch.equal(accuracies(model, digits), old)
    assert not model.resnet.encoder.stages[1]._forward_pre_hooks


# Names


class Labelled(nn.Sequential):
    def __init__(self, id2label):
        super().__init__(nn.Flatten(), nn.Linear(4, len(id2label)))
        self.config = type("Config", (), {"id2label": id2label})()


LABELS = {
    0: "tench, Tinca tinca",
    1: "goldfish, Carassius auratus",
    2: "crane",
    3: "crane",
    4: "great white shark, white shark",
}


def erase_labelled(forget, **settings):
    model = Labelled(LABELS)
    images, labels = torch.rand(50, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 5
    more_hf.erase_classes(model, [(images, labels)], forget, solver="covariance", **settings)
    return more_hf.get_erasure(model)


def test_synonyms_numbers_and_labels_that_two_classes_share():
    erasure = erase_labelled(["Tench"], remap_to=["goldfish"])
    assert erasure.facts.sent_to == {"tench, Tinca tinca": ["goldfish, Carassius auratus"]}
    sent = erase_labelled(3, remap_to=[4]).facts.sent_to
    assert sent == {"crane (class 3)": ["great white shark, white shark"]}
    assert erase_labelled("crane (class 2)", remap_to="white shark").concepts == ["crane (class 2)"]


def test_ambiguous_and_unknown_names():
    with pytest.raises(PrototypeError, match=r"2 \(crane \(class 2\)\), 3 \(crane \(class 3\)\). Pass"):
        erase_labelled("Crane")
    with pytest.raises(PrototypeError, match="horse"):
        erase_labelled("horse")
    with pytest.raises(PrototypeError, match="no class 5"):
        erase_labelled(5)
