import pytest
import torch
from support.compare import changed, state
from torch import nn

import more_hf
from more_hf.classification.features import collect_prototypes
from more_hf.core.errors import AlreadyErasedError, PrototypeError, SiteNotFoundError
from more_hf.data import load_classifier
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.training import accuracy, predict
from more_hf_bench.methods.classification.forget_samples import factors, forget_samples
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
    forget_samples(model, splits.f.loader(100), splits.r.loader(500))
    E = torch.eye(len(P_f), dtype=torch.float64) + (P_r - P_f) @ torch.linalg.pinv(P_f)
    expected = (before["classifier.weight"].double() @ E).float()
    torch.testing.assert_close(model.classifier.weight, expected, rtol=1e-4, atol=1e-6)
    assert changed(model, before) == {"classifier.weight"}
    W = model.classifier.weight.detach().double()
    original = before["classifier.weight"].double()
    apart = (original @ (P_f - P_r)).norm(dim=0)
    assert ((W @ P_f - original @ P_r).norm(dim=0) < 1e-4 * apart).all()
    assert not ((original @ P_f - original @ P_r).norm(dim=0) < 0.5 * apart).any()
    assert not model.classifier._forward_pre_hooks
    right = accuracy(predict(model, digits.test), digits.test.labels)
    assert right > 95


def test_what_does_not_hold(splits):
    """E is near the identity, no projection, moves the remain means, and still shows the forgotten ones."""
    P_f, P_r = means(load_classifier("digits-allcnn"), splits)
    shift, read = factors(P_f, P_r, as_printed=False)
    eye = torch.eye(len(P_f), dtype=torch.float64)
    E, apart = eye + shift @ read, (P_f - P_r).norm(dim=0)
    assert ((E @ P_f - P_r).norm(dim=0) < 1e-8 * apart).all()
    assert ((E @ P_r - P_r).norm(dim=0) / apart).max() > 0.3
    assert (E @ E - E).norm() > 0.3 * (E - eye).norm()
    assert (read @ E).norm() > 0.3 * read.norm()
    assert 0 < (E - eye).norm() < 0.5 * eye.norm()


def test_as_printed_sends_a_mean_elsewhere(splits):
    """With Algorithm 3's P_r P_r⁺, E p_f is p_f's projection on the span of the remain means."""
    model = load_classifier("digits-allcnn")
    original = model.classifier.weight.detach().double()
    P_f, P_r = means(model, splits)
    forget_samples(model, splits.f.loader(100), splits.r.loader(500), as_printed=True)
    E = torch.eye(len(P_f), dtype=torch.float64) - P_f @ torch.linalg.pinv(P_f) + P_r @ torch.linalg.pinv(P_r)
    torch.testing.assert_close(model.classifier.weight.detach().double(), original @ E, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(E @ P_f, P_r @ torch.linalg.pinv(P_r) @ P_f)
    assert ((E @ P_f - P_r).norm(dim=0) / (P_f - P_r).norm(dim=0)).max() > 0.1


@pytest.mark.parametrize("as_printed", [False, True])
def test_factors_are_those_of_both_formulas(as_printed):
    draw = torch.Generator().manual_seed(0)
    P_f, other = torch.randn(2, 12, 5, generator=draw, dtype=torch.float64)
    P_r = P_f + 0.1 * other
    shift, read = factors(P_f, P_r, as_printed)
    duals = torch.linalg.pinv(P_f), torch.linalg.pinv(P_r)
    wanted = -P_f @ duals[0] + (P_r @ duals[1] if as_printed else P_r @ duals[0])
    torch.testing.assert_close(shift @ read, wanted)
    assert ((P_f + shift @ read @ P_f - P_r).norm() < 1e-10) == (not as_printed)


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
