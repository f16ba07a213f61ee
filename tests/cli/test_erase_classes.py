"""`more-hf erase-classes` does on the command line what the call does."""

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, BertConfig, ViTImageProcessor

import more_hf
from more_hf.cli.main import main


@pytest.fixture(scope="session")
def folders(digit_classifier, digits, tmp_path_factory):
    """A saved classifier with its image processor, and images in folders by name, number and synonym."""
    model, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    digit_classifier.save_pretrained(model)
    options = {"do_resize": False, "do_rescale": True, "do_normalize": False}
    ViTImageProcessor(rescale_factor=1 / 255, **options).save_pretrained(model)
    names = ["0", "one", "2", "3", "four", "5", "six", "Seven", "8", "9"]
    for i, (image, label) in enumerate(zip(digits[0][:250, 0], digits[1][:250].tolist(), strict=True)):
        folder = data / ("train" if i < 200 else "test") / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image).round().numpy().astype(np.uint8)).save(folder / f"{i}.png")
    return model, data


def run(folders, output, *arguments):
    places = zip(("--model", "--data", "--output"), (*folders, output), strict=True)
    words = [str(word) for place in places for word in place]
    return main(["erase-classes", *words, *arguments])


def test_the_command_is_the_call(folders, digit_classifier, digits, tmp_path, capsys):
    words = "--forget four 7 --remap_to nine 1 --router hash --seed 3 --include_delta"
    assert run(folders, tmp_path / "out", *words.split()) == 0
    out = capsys.readouterr().out
    assert re.search(r"^forgotten +four, seven$", out, re.MULTILINE)
    assert f"more-hf verify {tmp_path / 'out'}" in out

    images, labels = digits[0][:200], digits[1][:200]
    seen = (255 * images).round() / 255  # as the PNG files hold them
    called = copy.deepcopy(digit_classifier)
    more_hf.erase_classes(called, [(seen, labels)], ["four", 7], remap_to=["nine", 1], router="hash", seed=3)
    loaded = more_hf.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, called(images).logits, rtol=1e-4, atol=1e-4)
        assert (loaded(images).logits - digit_classifier(images).logits).abs().max() > 1
    assert more_hf.get_erasure(loaded).request == more_hf.get_erasure(called).request
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").rescale_factor == 1 / 255


def test_the_defaults_are_the_calls(folders, digits, tmp_path):
    assert run(folders, tmp_path / "out", "--forget", "four") == 0
    erasure = more_hf.get_erasure(more_hf.load(tmp_path / "out"))

    assert erasure.request.remap_to == {"four": "remain"}
    assert erasure.facts.num_experts == 9
    assert not (tmp_path / "out" / "more_hf_delta.safetensors").exists()
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        predicted = plain(digits[0][1200:]).logits.argmax(1)
    assert (predicted[digits[1][1200:] == 4] == 4).float().mean() < 0.05
    assert (predicted[digits[1][1200:] == 0] == 0).float().mean() > 0.9
    assert run(folders, tmp_path / "none", "--forget", "four", "--remap_to", "none") == 0
    assert more_hf.get_erasure(more_hf.load(tmp_path / "none")).request.remap_to == {"four": ()}


def test_what_it_did_to_other_images(folders, tmp_path, capsys):
    data = folders[1]
    assert run(folders, tmp_path / "out", "--forget", "four", "--test", str(data)) == 0
    out, err = capsys.readouterr()
    assert f"Reading 200 images in {data} (split 'train')" in err
    assert f"Reading 50 images in {data} (split 'test')" in err
    forgotten = re.search(r"^\| four \(forgotten\) +\| +(\d+) \| +(\S+) \| +(\S+) \|$", out, re.MULTILINE)
    assert int(forgotten[1]) == len(list((data / "test" / "four").iterdir()))
    assert float(forgotten[2]) > 90 > 5 > float(forgotten[3])
    assert "| the others, together " in out
    with Image.open(tmp_path / "out" / "compare.png") as picture:
        assert picture.width > 400

    # The table goes along: into the record, and from there into the card.
    table = out[out.index(f"Percent of the 50 images in {data.name} (split 'test') that are classified") :]
    push = ["push", str(tmp_path / "out"), "me/without-four", "--dry_run", str(tmp_path / "to_push")]
    assert main(push) == 0
    card = (tmp_path / "to_push" / "README.md").read_text()
    assert "![Which class the samples of each class are given, before and after](before_after.png)" in card
    for line in table.splitlines()[:14]:
        assert line in card


def test_a_file_of_names_and_the_plan(folders, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("Four\n\n7\n")
    words = ["--forget_file", str(tmp_path / "names.txt"), "--resume", str(tmp_path / "pass")]
    assert run(folders, tmp_path / "out", *words) == 0
    assert (tmp_path / "pass").is_file()
    err = capsys.readouterr().err
    assert "|     4 | four      | the mean of all that stay |" in err
    assert "8 classes stay: zero, one, two, three, five, six, eight, nine" in err
    assert more_hf.get_erasure(more_hf.load(tmp_path / "out")).concepts == ["four", "seven"]


def test_a_model_that_is_no_classifier(tmp_path, capsys):
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "model")
    assert run((tmp_path / "model", tmp_path), tmp_path / "out", "--forget", "0") == 2
    assert "By its name a BertForMaskedLM is no classifier" in capsys.readouterr().err


def test_failures_in_one_line(folders, tmp_path, capsys):
    def line(*arguments, data=None):
        assert run((folders[0], data or folders[1]), tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("Error: ")
        assert not (tmp_path / "out").exists()
        return error

    assert "no class 'fuor'. Did you mean 'four'" in line("--forget", "fuor")
    assert "Nothing to forget is named" in line()
    assert "'four' is in `forget` twice" in line("--forget", "four", "Four")
    assert "is both in `forget` and in `remap_to`" in line("--forget", "four", "--remap_to", "4")
    assert "beside other names" in line("--forget", "four", "--remap_to", "none", "one")
    assert "There is no folder" in line("--forget", "four", data=tmp_path / "nowhere")
    flat, other = tmp_path / "flat", tmp_path / "other"
    for path in (flat / "0.png", other / "horse" / "0.png", other / "one" / "1.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    assert "images without labels" in line("--forget", "four", data=flat)
    assert "no class 'horse'" in line("--forget", "four", data=other)
