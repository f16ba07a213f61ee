import math

import pytest
import torch
from support.classifiers import token_classifier
from support.compare import same, state
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

import more_hf
from more_hf.classification.features import collect_prototypes, features_of
from more_hf.core.errors import MoreError, SiteNotFoundError
from more_hf.core.remap import Remap
from more_hf.core.routers import PrototypeRouter
from more_hf.data import load_classifier
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.training import accuracy, predict
from more_hf_bench.methods.classification.router_training import (
    COMBINATIONS,
    LOSSES,
    balance_loss,
    fit_router,
    train_router,
)


FORGET = "3"


@pytest.fixture(scope="module")
def digits():
    return load_kd_data("digits")


@pytest.fixture(scope="module")
def cached(digits):
    """Features, labels and head of the digits AllCNN, and a remap of class 3 with eight experts."""
    model = load_classifier("digits-allcnn")
    features, labels = (
        torch.cat(parts) for parts in zip(*features_of(model, digits.train.loader(500)), strict=True)
    )
    prototypes = collect_prototypes(model, digits.train.loader(500))
    remap = Remap.fit(prototypes, [FORGET], [[name] for name in "01245678"])
    head = (model.classifier.weight.detach(), model.classifier.bias.detach())
    return remap, head, features, labels, labels == int(FORGET)


def fit(cached, weight=None, **options):
    weight = PrototypeRouter.initial(cached[0]) if weight is None else weight
    return fit_router(*cached, weight, **options)


def load(weight, features, num_experts=8):
    """How many features take each expert."""
    return torch.bincount((features @ weight.T).argmax(1), minlength=num_experts)


def reference_losses(remap, head, features, labels, forgotten, weight):
    """L_R, L_F and L_FLB of appendix D.2 sample by sample: top-1's value, the mixture's gradient."""
    weight = weight.clone().requires_grad_()
    eye = torch.eye(len(remap.prototypes.matrix), dtype=torch.float64)
    experts = [eye + remap.shift(e) @ remap.D_F for e in range(remap.num_experts)]
    entropies, gates, chosen = [], [], []
    for z, y in zip(features.double(), labels, strict=True):
        p = torch.softmax(weight @ z, 0)
        e = int(p.argmax())
        mixture = sum(p[i] * (experts[i] @ z) for i in range(len(p)))
        routed = experts[e] @ z + mixture - mixture.detach()
        entropies.append(-torch.log_softmax(head[0].double() @ routed + head[1].double(), 0)[y])
        gates.append(p)
        chosen.append(e)
    entropies = torch.stack(entropies)
    out = forgotten.nonzero()[:, 0].tolist()
    balance = 0.0
    for e in range(weight.shape[0]):
        importance = sum(gates[i][e] for i in out) / len(out)
        balance = balance + importance * sum(chosen[i] == e for i in out) / len(out)
    parts = {
        "remain": entropies[~forgotten].mean(),
        "forget": -entropies[forgotten].mean(),
        "balance": remap.num_experts * balance,
    }
    return parts, weight


@pytest.mark.parametrize("losses", [None, *COMBINATIONS])
def test_one_step_is_adams_on_the_written_out_loss(cached, losses):
    """W moves by Adam's first step, −lr g / (|g| + eps); by default on the two losses of the paper's -T-B."""
    remap, head, features, labels, forgotten = cached
    index = torch.cat([forgotten.nonzero()[:20, 0], (~forgotten).nonzero()[:40, 0]])
    batch = (remap, head, features[index], labels[index], forgotten[index])
    start = PrototypeRouter.initial(remap)
    parts, weight = reference_losses(*batch, start)
    weights = {"remain": 1, "forget": 0.001, "balance": 1}
    total = sum(weights[name] * parts[name] for name in losses or ("remain", "balance"))
    total.backward()
    asked = {} if losses is None else {"losses": losses}
    trained, log = fit(batch, start, **asked, epochs=1, batch_size=60, learning_rate=1e-3)
    for name in LOSSES:
        assert log[0][f"loss_{name}"] == pytest.approx(parts[name].item(), rel=1e-3)
    assert log[0]["loss"] == pytest.approx(total.item(), rel=1e-3)
    gradient = weight.grad
    clear = gradient.abs() > 1e-4 * gradient.abs().max()  # of the others, float32 does not know the sign
    clear &= gradient.abs() > 1e-5
    moved = (trained.double() - start)[clear]
    assert clear.sum() > 50
    torch.testing.assert_close(moved, -1e-3 * gradient[clear].sign(), rtol=2e-2, atol=1e-5)


def test_the_balance_loss_evens_out_the_forgotten(cached):
    """From a random start, with a learning rate that shows it in ten epochs, and with none."""
    start = 0.1 * torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    still, _ = fit(cached, start, losses=["balance"], learning_rate=0.0)
    trained, log = fit(cached, start, losses=["balance"], learning_rate=1e-2)
    assert still.equal(start)
    before, after = (load(weight, cached[2][cached[4]]).double() for weight in (still, trained))
    assert after.std() < 0.6 * before.std()  # of as many samples
    assert log[-1]["loss_balance"] < log[0]["loss_balance"]


@pytest.mark.parametrize("loss", ["remain", "forget"])
def test_each_loss_alone_falls(cached, loss):
    """L_R and L_F from a random start, with a learning rate that shows it in ten epochs."""
    start = 0.1 * torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    _, log = fit(cached, start, losses=[loss], learning_rate=1e-2)
    assert log[-1][f"loss_{loss}"] < log[0][f"loss_{loss}"]


def test_same_seed_same_router_and_papers_settings(cached):
    (one, log), (same, _), (other, _) = fit(cached), fit(cached), fit(cached, seed=1)
    assert one.equal(same)
    assert not one.equal(other)
    assert len(log) == 10
    steps = 10 * math.ceil(len(cached[2]) / 512)
    moved = (one.double() - PrototypeRouter.initial(cached[0])).abs().max()
    assert 0 < moved <= 1e-5 * steps * 1.01  # Adam's largest step is lr


def test_more_experts_than_remain_classes(cached):
    """P_R⁺ has nine rows (Algorithm 4): experts 9 to 11 have none and stay idle."""
    remap, *rest = cached
    wide = Remap.fit(remap.prototypes, [FORGET], [[name] for name in "012456789012"])
    start = PrototypeRouter.initial(wide)
    assert start.shape == (9, 32)
    trained, _ = fit((wide, *rest), learning_rate=1e-2)
    assert trained.shape == (9, 32)
    taken = load(trained, rest[1], wide.num_experts)
    assert taken[9:].tolist() == [0, 0, 0]
    assert (taken[:9] > 0).sum() > 3


def test_batches_without_one_side(cached):
    """Losses that need the side that a batch lacks are left out of it."""
    remap, head, features, labels, forgotten = cached
    side = {
        rows: (remap, head, features[index], labels[index], forgotten[index])
        for rows, index in (("only", forgotten), ("none", ~forgotten))
    }
    (_, only), (_, none) = fit(side["only"], epochs=1), fit(side["none"], epochs=1)
    assert only[0]["loss_remain"] == 0.0
    assert none[0]["loss_forget"] == none[0]["loss_balance"] == 0.0
    nothing, _ = fit(side["none"], losses=["balance"], epochs=1)
    assert nothing.equal(PrototypeRouter.initial(remap).float())


def test_balance_loss_at_its_ends():
    even, one = torch.full((4, 4), 0.25), torch.eye(4)[[2, 2, 2, 2]]
    assert balance_loss(even, torch.arange(4), 4) == pytest.approx(1)
    assert balance_loss(one, torch.tensor([2, 2, 2, 2]), 4) == pytest.approx(4)


@pytest.mark.parametrize("losses", [[], ["remain", "balanced"]])
def test_unknown_losses(cached, losses):
    with pytest.raises(MoreError, match="some of remain, forget, balance"):
        fit(cached, losses=losses)


@pytest.mark.parametrize("router", ["prototype", "prototype_random"])
def test_a_models_router_is_trained_in_place(digits, cached, router):
    model = load_classifier("digits-allcnn")
    options = {"num_experts": 8, "router": router, "solver": "pinv"}
    more_hf.erase_classes(model, digits.train.loader(500), [FORGET], **options)
    erasure = more_hf.get_erasure(model)
    weights = state(model)
    start = erasure.hook.router.weight.clone()
    train_router(model, digits.train.loader(500), learning_rate=1e-2, epochs=2)
    trained = erasure.hook.router.weight
    assert same(model, weights)
    assert not start.equal(trained)
    # the same from cached features of the original model and its original head
    again, _ = fit((erasure.remap, *cached[1:]), start, learning_rate=1e-2, epochs=2)
    torch.testing.assert_close(again, trained, rtol=1e-3, atol=1e-4)
    experts = erasure.hook.router(cached[2])
    assert experts.equal((cached[2] @ trained.T).argmax(1))
    remaining = digits.test.subset(digits.test.labels != int(FORGET))
    assert accuracy(predict(model, remaining), remaining.labels) > 95


def test_what_has_no_router_to_train(digits):
    model = load_classifier("digits-allcnn")
    with pytest.raises(MoreError, match="Only a prototype router"):
        train_router(model, digits.train.loader(500))
    more_hf.erase_classes(model, digits.train.loader(500), [FORGET], router="hash")
    with pytest.raises(MoreError, match="Only a prototype router"):
        train_router(model, digits.train.loader(500))


def test_without_a_single_head(digits):
    inner = load_classifier("digits-allcnn")
    more_hf.erase_classes(inner, digits.train.loader(500), [FORGET], router="prototype", at="features.7")
    with pytest.raises(SiteNotFoundError, match="0 edited heads .it was erased at an inner module"):
        train_router(inner, digits.train.loader(500))
    two = token_classifier(DeiTForImageClassificationWithTeacher, DeiTConfig)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(two.distillation_classifier.weight)
        nn.init.normal_(two.cls_classifier.weight)
    more_hf.erase_classes(two, digits.train.loader(500), [FORGET], router="prototype", solver="covariance")
    with pytest.raises(SiteNotFoundError, match="2 edited heads"):
        train_router(two, digits.train.loader(500))
