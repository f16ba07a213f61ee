"""What the method promises, on features of a trained classifier, and what it does not."""

import copy

import pytest
import torch
from sklearn.linear_model import LogisticRegression

import more_hf
from more_hf.classification.features import features_of


FORGET, TARGET = 4, 9
EVERY = slice(0, 1200)


@pytest.fixture(scope="session")
def original(digit_classifier, digits):
    """Features `(1797, 32)` float64 of the backbone."""
    with torch.no_grad():
        return digit_classifier.resnet(digits[0]).pooler_output.flatten(1).double()


@pytest.fixture
def erased(digit_classifier, prototypes):
    """A factory of `(model, remap)`: the class is sent to the target unless settings say otherwise."""

    def build(**settings):
        model = copy.deepcopy(digit_classifier)
        more_hf.erase_classes(model, prototypes, FORGET, **{"remap_to": [TARGET], **settings})
        return model, more_hf.get_erasure(model).remap

    return build


def passed(model, digits):
    """Features `(1797, 32)` as the head reads them now: one pass."""
    [(features, _)] = features_of(model, [digits])
    return features.double()


def means(features, labels):
    return torch.stack([features[EVERY][labels[EVERY] == i].mean(0) for i in range(10)])


def probe(features, labels, **settings):
    fitter = LogisticRegression(**{"C": 1e4, "max_iter": 3000, "tol": 1e-8, **settings})
    return fitter.fit(features.numpy(), labels.numpy())


def recovered(features, labels, rows=EVERY):
    """Percent of held-out images of the forgotten class that a new linear probe finds again."""
    scaled = features / features[rows].std(0).clamp_min(1e-6)
    fitted = probe(scaled[rows], labels[rows], C=100.0, tol=1e-4)
    held = labels[1200:] == FORGET
    return 100 * float((fitted.predict(scaled[1200:][held].numpy()) == FORGET).mean())


# G1 to G4, on what the model itself makes of real images


@pytest.mark.parametrize("settings", [{}, {"solver": "covariance"}], ids=str)
def test_g1_class_means_go_where_they_should(erased, original, digits, settings):
    model, _ = erased(**settings)
    before, after = means(original, digits[1]), means(passed(model, digits), digits[1])
    scale = (before[FORGET] - before[TARGET]).norm()

    assert (after[FORGET] - before[TARGET]).norm() / scale < 1e-5
    assert (after[TARGET] - before[TARGET]).norm() / scale < 1e-5
    rest = [i for i in range(10) if i not in (FORGET, TARGET)]
    moved = float((after[rest] - before[rest]).norm(dim=1).max() / scale)
    if settings:
        assert 1e-3 < moved < 0.5  # only the targets are exact
    else:
        assert moved < 1e-5


def test_g3_no_image_shows_a_forget_coordinate(erased, original, digits):
    model, remap = erased(router="random", num_experts=3, remap_to="remain")
    read = passed(model, digits) @ remap.D_F.T
    assert read.abs().max() < 1e-4
    assert (original @ remap.D_F.T)[digits[1] == FORGET].min() > 0.1


def test_g4_the_change_is_the_forget_coordinate_times_the_shift(erased, original, digits):
    model, remap = erased()
    change = passed(model, digits) - original
    torch.testing.assert_close(change, (original @ remap.D_F.T) @ remap.shift().T, rtol=1e-4, atol=1e-5)
    # the part of every image with no such coordinate
    untouched = original - (original @ remap.D_F.T) @ torch.linalg.pinv(remap.D_F).T
    assert (remap.apply(untouched) - untouched).abs().max() < 1e-9
    assert untouched.norm() > 0.5 * original.norm()


# G5: what a linear probe can see


def balanced(labels, generator=0):
    """As many rows of the target as of the forgotten class, and all rows of the others."""
    forget, target = (labels[EVERY] == FORGET).nonzero()[:, 0], (labels[EVERY] == TARGET).nonzero()[:, 0]
    count = min(len(forget), len(target))
    rest = ((labels[EVERY] != FORGET) & (labels[EVERY] != TARGET)).nonzero()[:, 0]
    return torch.cat([forget[:count], target[:count], rest])


def probe_gap(features, labels, rows):
    """How far the probe's weights for the forgotten class and the target differ, and their intercepts."""
    fitted = probe(features[rows], labels[rows], C=1.0)
    difference = torch.tensor(fitted.coef_[FORGET] - fitted.coef_[TARGET])
    return float(difference.abs().max()), float(abs(fitted.intercept_[FORGET] - fitted.intercept_[TARGET]))


def test_g5_a_regularised_probe_gives_both_classes_the_same_weights(digit_classifier, digits, original):
    images, labels = digits
    rows = balanced(labels)
    model = copy.deepcopy(digit_classifier)
    own = [(images[rows], labels[rows])]  # the probe's own data
    more_hf.erase_classes(model, own, FORGET, remap_to=TARGET)
    remap = more_hf.get_erasure(model).remap

    after = probe_gap(remap.apply(original), labels, rows)
    assert max(after) < 1e-3
    assert max(probe_gap(passed(model, digits), labels, rows)) < 1e-3  # in float32, through the hook
    assert min(probe_gap(original, labels, rows)) > 0.03  # before
    # the controls: other data than the prototypes', another number of samples, no target
    half = rows[::2]
    assert probe_gap(remap.apply(original), labels, half)[0] > 0.03
    more_hf.restore(model)
    more_hf.erase_classes(model, own, FORGET, remap_to=None)
    assert probe_gap(passed(model, digits), labels, rows)[0] > 0.1


# The controls


def test_erase_alone_stays_separable(erased, original, digits):
    model, _ = erased(remap_to=None)
    assert recovered(original, digits[1]) > 90
    assert recovered(passed(model, digits), digits[1]) > 80


def test_a_mean_over_several_targets_stays_separable(erased, digits):
    model, _ = erased(remap_to="remain", num_experts=9)
    assert recovered(passed(model, digits), digits[1]) > 80


@pytest.mark.slow
@pytest.mark.parametrize(("router", "lost"), [("random", True), ("hash", False)])
def test_averaging_undoes_random_routing_and_not_hash_routing(erased, digits, router, lost):
    model, _ = erased(router=router, remap_to="remain")
    once = passed(model, digits)
    average = torch.stack([passed(model, digits) for _ in range(64 if lost else 4)]).mean(0)
    found_once, found = recovered(once, digits[1]), recovered(average, digits[1])

    if lost:
        assert found_once < 50
        assert found > 80
    else:
        assert found == found_once < 80
        assert torch.equal(average, once) or (average - once).abs().max() < 1e-6


def test_two_queries_do_not_invert_hash_routing(erased, digits):
    model, _ = erased(router="hash", remap_to="remain")
    hook = more_hf.get_erasure(model).hook
    first, taken = passed(model, digits), hook.taken
    second = passed(model, digits)

    assert len(taken.unique()) > 4  # it does scatter
    assert torch.equal(hook.taken, taken)
    assert torch.equal(first, second)


def test_a_layer_of_ones_own_sees_the_original_features_without_the_hook(erased, digits, original):
    """The checkpoint forgets at the logits only: a new probe has the class back."""
    model, _ = erased()
    copied = copy.deepcopy(model)  # as a reload: weights without the hook
    features = passed(copied, digits)
    torch.testing.assert_close(features, original, rtol=1e-6, atol=1e-6)
    assert recovered(features, digits[1]) > 90
    with torch.no_grad():
        predicted = copied(digits[0][1200:]).logits.argmax(1)
    assert (predicted[digits[1][1200:] == FORGET] != FORGET).all()
