"""What an edit costs the classes that stay is estimated before it is made, and refused beyond a bound."""

import copy
import logging

import pytest
import torch
from support.compare import same, state
from torch import nn

import more_hf
from more_hf import PrototypeError


CLASSES = 40


@pytest.fixture(scope="module")
def crowd():
    """Forty classes in sixteen features, a head that knows them, and images that it has not seen."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(CLASSES, 16, generator=generator)

    def draw(count):
        labels = torch.arange(count) % CLASSES
        return centres[labels] + 0.6 * torch.randn(count, 16, generator=generator), labels

    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    with torch.no_grad():  # the nearest centre
        model[1].weight.copy_(centres)
        model[1].bias.copy_(-centres.square().sum(1) / 2)
    return model, draw(4000), draw(2000)


def accuracy(model, images, labels):
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("settings", [{}, {"remap_to": [39]}, {"router": "random"}], ids=str)
@pytest.mark.parametrize("count", [1, 4, 8])
def test_the_estimate_is_what_new_images_show(crowd, settings, count):
    model, train, (images, labels) = copy.deepcopy(crowd[0]), *crowd[1:]
    stays = labels >= count
    before = accuracy(model, images[stays], labels[stays])
    more_hf.erase_classes(model, [train], list(range(count)), most_lost=100, **settings)
    estimate = more_hf.get_erasure(model).facts.remain_right
    after = accuracy(model, images[stays], labels[stays])

    assert estimate["before"] == pytest.approx(before, abs=3)
    assert estimate["after"] == pytest.approx(after, abs=4)
    if count == 8:
        assert after < before - 30


def test_too_dear_is_refused_and_done_on_demand(crowd, caplog):
    model, train, _ = copy.deepcopy(crowd[0]), *crowd[1:]
    before = state(model)
    with pytest.raises(PrototypeError, match=r"[\d.]+ % before and \d\.\d % after forgetting 15 of 40"):
        more_hf.erase_classes(model, [train], list(range(15)))
    assert same(model, before)
    assert more_hf.get_erasure(model) is None

    with caplog.at_level(logging.WARNING, "more_hf"):
        more_hf.restore(more_hf.erase_classes(model, [train], [0]))  # which costs little
        assert not caplog.text
        more_hf.erase_classes(model, [train], list(range(15)), most_lost=100)
    assert "forgetting 15 of 40 classes" in caplog.text
    right = more_hf.get_erasure(model).facts.remain_right
    row = f"{right['before']:.1f} % before, {right['after']:.1f} % after"
    assert row in more_hf.get_erasure(model).to_markdown()
    more_hf.restore(model, list(range(14)))  # undoing a part is never refused
    assert same(more_hf.restore(model), before)


def test_prototypes_alone_stay_where_they_are(digit_classifier, prototypes):
    """Without a second moment nothing is drawn around them, and `pinv` keeps them all."""
    model = copy.deepcopy(digit_classifier)
    alone = more_hf.Prototypes(prototypes.matrix, prototypes.names, prototypes.counts)
    more_hf.erase_classes(model, alone, 4)
    assert more_hf.get_erasure(model).facts.remain_right == {"before": 100, "after": 100}


def test_of_the_forgotten_class_alone_nothing_is_known(digit_classifier, prototypes):
    model = copy.deepcopy(digit_classifier)
    alone = prototypes.without([name for name in prototypes.names if name != "four"])
    more_hf.erase_classes(model, alone, "four", remap_to=None)
    assert more_hf.get_erasure(model).facts.remain_right is None
    assert "remaining classes recognized" not in more_hf.get_erasure(model).to_markdown()


@pytest.mark.parametrize("odd", [-1, 101, float("nan")], ids=str)
def test_odd_bounds(digit_classifier, prototypes, odd):
    with pytest.raises(PrototypeError, match="`most_lost`"):
        more_hf.erase_classes(digit_classifier, prototypes, 4, most_lost=odd)
