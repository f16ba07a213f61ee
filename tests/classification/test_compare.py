"""`compare`: every class's accuracy, as counted by hand, as a table."""

from dataclasses import replace

import pytest
import torch
from support.compare import accuracies

import more_hf
from more_hf import MoreError, PrototypeError
from more_hf.classification.accuracies import Accuracies, ClassAccuracy
from more_hf.classification.compare import note
from more_hf.core.record import Record


def test_the_accuracies_are_those_counted_by_hand(model, prototypes, digits, digit_classifier):
    before = accuracies(model, digits)
    more_hf.erase_classes(model, prototypes, "four")
    after = accuracies(model, digits)
    test = [(digits[0][1200:1500], digits[1][1200:1500]), (digits[0][1500:], digits[1][1500:])]
    found = more_hf.compare(model, iter(test))

    assert [one.before for one in found.classes] == pytest.approx(before.tolist(), abs=1e-3)
    assert [one.after for one in found.classes] == pytest.approx(after.tolist(), abs=1e-3)
    assert [one.name for one in found.classes if one.forgotten] == ["four"]
    assert sum(one.count for one in found.classes) == 597
    assert more_hf.compare(model, test, original=digit_classifier) == found
    assert not model.training


def test_what_the_samples_became_is_counted_and_goes_into_report_and_record(
    model, prototypes, digits, digit_classifier, tmp_path
):
    more_hf.erase_classes(model, prototypes, "four")
    images, labels = digits[0][1200:], digits[1][1200:]
    labels = torch.where(labels == 0, -1, labels)  # left out
    found = more_hf.compare(model, [(images, labels)])
    with torch.no_grad():
        counts = torch.bincount(model(images[labels == 4]).logits.argmax(1), minlength=10)
        was = torch.bincount(digit_classifier(images[labels == 4]).logits.argmax(1), minlength=10)
    four = next(one for one in found.classes if one.name == "four")
    assert "zero" not in [one.name for one in found.classes]
    for shares, expected in ((four.became, counts), (four.was, was)):
        percent = [shares.get(name, 0) for name in model.config.id2label.values()]
        assert percent == pytest.approx((100 * expected / expected.sum()).tolist())
    assert list(four.became.values()) == sorted(four.became.values(), reverse=True)
    assert four.became != four.was

    note(model, found, "597 digits")
    rows = dict(more_hf.get_erasure(model).rows())
    largest, share = next(iter(four.became.items()))
    assert rows["forgotten samples became"].startswith(f"four: {largest} {share:.0f} %")
    assert rows["forgotten classes, measured"].endswith(f"{four.after:.1f} % after, of 597 digits")
    assert rows["lost most"] == "no class"
    assert Record.read(more_hf.save(model, tmp_path / "saved")).facts == more_hf.get_erasure(model).facts
    dog = replace(found.classes[-1], name="dog", before=100.0, after=97.0)
    note(model, Accuracies((*found.classes, dog)), "digits")
    assert dict(more_hf.get_erasure(model).rows())["lost most"] == "dog by 3.0 points"
    alone = replace(found, classes=tuple(replace(one, before=None) for one in found.classes))
    with pytest.raises(MoreError, match="lack those of the original"):
        note(model, alone, "digits")


def test_the_picture_has_a_dark_cell_for_what_the_samples_became():
    cat = ClassAccuracy("cat", True, 30, 100.0, 0.0, {"cat": 100.0}, {"dog": 50.0, "emu": 50.0})
    dog = ClassAccuracy("dog", False, 10, 100.0, 100.0, {"dog": 100.0}, {"dog": 100.0})
    full = "\x00\x00\x80"  # the color of all samples

    def drawn(*classes):
        return Accuracies(classes).to_picture().tobytes().count(full.encode("latin-1"))

    # three cells hold all samples of a class, of which one is after the edit
    assert drawn(cat, dog) == 3 * drawn(replace(cat, was={}), replace(dog, was={})) > 100


def test_the_table_has_both_sides_and_their_means():
    cat, dog = ClassAccuracy("cat", True, 30, 90.0, 0.0), ClassAccuracy("dog", False, 10, 80.0, 100.0)
    found = Accuracies((cat, dog))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in str(found).splitlines()]
    assert lines[2:] == [
        ["cat (forgotten)", "30", "90.000", "0.000"],
        ["dog", "10", "80.000", "100.000"],
        ["forgotten, together", "30", "90.000", "0.000"],
        ["the others, together", "10", "80.000", "100.000"],
    ]
    assert found._repr_markdown_() == found.to_markdown() == str(found)


def test_of_many_classes_those_that_moved_are_listed():
    classes = [ClassAccuracy(f"c{i}", i == 7, 1, 50.0, 50.0 + 0.1 * (i == 999)) for i in range(1000)]
    found = Accuracies(tuple(classes))
    table = found.to_markdown()
    assert "| c7 (forgotten) " in table
    assert "| c999 " in table
    assert "| 960 that moved less " in table


def test_an_original_that_is_not_here(model, prototypes, digits, digit_classifier):
    test = [(digits[0][1200:], digits[1][1200:])]
    more_hf.erase_classes(model, prototypes, "four", keep_originals=False)
    alone = more_hf.compare(model, test)
    assert all(one.before is None for one in alone.classes)
    assert "before" not in str(alone)
    assert alone.classes == tuple(
        replace(one, before=None, was={})
        for one in more_hf.compare(model, test, original=digit_classifier).classes
    )
    more = more_hf.compare(digit_classifier, test, original=model)
    assert not any(one.forgotten for one in more.classes)


def test_a_router_is_asked_the_same_way_each_time(model, prototypes, digits):
    more_hf.erase_classes(model, prototypes, "four", router="random")
    test = [(digits[0][1200:], digits[1][1200:])]
    assert more_hf.compare(model, test) == more_hf.compare(model, test)


def test_refusals(model, prototypes, digits):
    test = [(digits[0][:9], digits[1][:9])]
    with pytest.raises(MoreError, match="Nothing was erased"):
        more_hf.compare(model, test)
    more_hf.erase_classes(model, prototypes, "four")
    with pytest.raises(PrototypeError, match="no batch"):
        more_hf.compare(model, [])
    with pytest.raises(PrototypeError, match="label 10"):
        more_hf.compare(model, [(digits[0][:9], torch.arange(2, 11))])
