import pytest
import torch
from support.compare import changed, same, state
from torch import nn

import more_hf
from more_hf.classification.features import collect_prototypes
from more_hf.core.errors import AlreadyErasedError, PrototypeError, SiteNotFoundError
from more_hf.data import load_classifier
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.training import accuracy, predict
from more_hf_bench.methods.classification.forget_samples import factors, forget_samples, measure
from more_hf_bench.splits import split_by_sample


@pytest.fixture(scope="module")
def digits():
    return load_kd_data("digits")


@pytest.fixture(scope="module")
def splits(digits):
    return split_by_sample(digits, 0.1)


def means(model, splits):
    parts = (splits.f, splits.r)
    return [collect_prototypes(model, part.loader(500), second_moment=False).matrix for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-allcnn", "digits-vit"])
def test_the_head_treats_forgotten_means_as_the_others(name, splits, digits):
    """W E with the textbook's E, and nothing else changed: the features, and so the means, stay."""
    model = load_classifier(name)
    before = state(model)
    P_f, P_r = means(model, splits)
    report = forget_samples(model, splits.f.loader(100), splits.r.loader(500))
    E = torch.eye(len(P_f), dtype=torch.float64) + (P_r - P_f) @ torch.linalg.pinv(P_f)
    expected = (before["classifier.weight"].double() @ E).float()
    torch.testing.assert_close(model.classifier.weight, expected, rtol=1e-4, atol=1e-6)
    assert changed(model, before) == {"classifier.weight"}
    W = model.classifier.weight.detach().double()
    original = before["classifier.weight"].double()
    apart = (original @ (P_f - P_r)).norm(dim=0)
    assert ((W @ P_f - original @ P_r).norm(dim=0) < 1e-4 * apart).all()
    assert not ((original @ P_f - original @ P_r).norm(dim=0) < 0.5 * apart).any()
    assert report.facts["forget_to_remain"] < 1e-8
    assert report.facts["proof"] < 1e-3
    assert not model.classifier._forward_pre_hooks
    right = accuracy(predict(model, digits.test), digits.test.labels)
    assert right > 95
    report.restore()
    assert same(model, before)


def test_what_does_not_hold_is_said(splits):
    """E is near the identity, no projection, moves the remain means, and still shows the forgotten ones."""
    facts = forget_samples(load_classifier("digits-allcnn"), splits.f.loader(100), splits.r.loader(500)).facts
    assert facts["forget_to_remain"] < 1e-8
    assert facts["remain_moved"] > 0.3
    assert facts["idempotent"] > 0.3
    assert facts["nothing_left"] > 0.3
    assert 0 < facts["change"] < 0.5
    assert 0 < facts["weight_changed"] < 0.5


def test_as_printed_sends_a_mean_elsewhere(splits):
    """With Algorithm 3's P_r P_r⁺, E p_f is p_f's projection on the span of the remain means."""
    model = load_classifier("digits-allcnn")
    original = model.classifier.weight.detach().double()
    P_f, P_r = means(model, splits)
    report = forget_samples(model, splits.f.loader(100), splits.r.loader(500), as_printed=True)
    E = torch.eye(len(P_f), dtype=torch.float64) - P_f @ torch.linalg.pinv(P_f) + P_r @ torch.linalg.pinv(P_r)
    torch.testing.assert_close(model.classifier.weight.detach().double(), original @ E, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(E @ P_f, P_r @ torch.linalg.pinv(P_r) @ P_f)
    assert report.facts["forget_to_remain"] > 0.1


@pytest.mark.parametrize("as_printed", [False, True])
def test_measurements_against_matrices(as_printed):
    draw = torch.Generator().manual_seed(0)
    P_f = torch.randn(12, 5, generator=draw, dtype=torch.float64)
    P_r = P_f + 0.1 * torch.randn(12, 5, generator=draw, dtype=torch.float64)
    shift, read = factors(P_f, P_r, as_printed)
    E = torch.eye(12, dtype=torch.float64) + shift @ read
    found = measure(P_f, P_r, shift, read)
    worst = max(float((E @ P_f[:, i] - P_r[:, i]).norm() / (P_f[:, i] - P_r[:, i]).norm()) for i in range(5))
    assert found["forget_to_remain"] == pytest.approx(worst, abs=1e-12)
    assert (found["forget_to_remain"] < 1e-10) == (not as_printed)
    assert found["idempotent"] == pytest.approx(float((E @ E - E).norm() / (E - torch.eye(12)).norm()))


def test_dependent_means(splits):
    P = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PrototypeError, match="6 forgotten class means span 4 of 4 dimensions"):
        factors(P, P, False)
    model = load_classifier("digits-allcnn")
    before = model.classifier.weight.detach().clone()
    three = splits.f.subset(splits.f.labels < 3)
    with pytest.raises(PrototypeError, match="No feature was seen for '3'"):
        forget_samples(model, three.loader(100), splits.r.loader(500))
    assert model.classifier.weight.equal(before)


def test_models_that_are_refused(splits):
    model = load_classifier("digits-allcnn")
    more_hf.erase_classes(model, splits.r.loader(500), ["3"])
    with pytest.raises(AlreadyErasedError, match="restore"):
        forget_samples(model, splits.f.loader(100), splits.r.loader(500))
    model = load_classifier("digits-allcnn")
    with pytest.raises(SiteNotFoundError, match="no module 'head'"):
        forget_samples(model, splits.f.loader(100), splits.r.loader(500), head="head")


@pytest.mark.slow
def test_an_edit_that_drowns_in_rounding_is_rolled_back(splits):
    """The same samples on both sides but one: means so close that bfloat16 cannot hold the change."""
    model = load_classifier("digits-allcnn").to(torch.bfloat16)
    before = model.classifier.weight.detach().clone()
    nearly = splits.r.subset(torch.arange(1, len(splits.r)))
    with pytest.raises(SiteNotFoundError, match="drowns in the rounding of torch.bfloat16"):
        forget_samples(model, nearly.loader(500), splits.r.loader(500))
    assert model.classifier.weight.equal(before)


def test_a_model_with_two_heads(splits):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.one, self.two = nn.Flatten(), nn.Linear(64, 10), nn.Linear(64, 10)

        def forward(self, pixels):
            z = self.flat(pixels)
            return (self.one(z) + self.two(z)) / 2

    model = Two()
    with pytest.raises(SiteNotFoundError, match="one head, and this model has one, two"):
        forget_samples(model, splits.f.loader(100), splits.r.loader(500))
