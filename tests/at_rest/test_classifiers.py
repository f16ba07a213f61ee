"""Whatever saves, copies, compiles or reloads an erased classifier, it stays erased, at its head at least."""

import copy
import json
import logging
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.classifiers import token_classifier
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import more_hf
from more_hf import AlreadyErasedError, ExportError, IncompatibleBaseError, MoreError
from more_hf.classification.features import features_of


DELTA = "more_hf_delta.safetensors"


def logits(model, digits):
    with torch.no_grad():
        return model.eval()(digits[0][1200:]).logits


def features(model, digits):
    [(found, _)] = features_of(model, [digits])
    return found


def forgets(model, digits):
    """Of the held-out fours: how many are still called a four."""
    return int((logits(model, digits).argmax(1)[digits[1][1200:] == 4] == 4).sum())


# Plain tools


def test_from_pretrained_forgets_with_the_originals_features(
    model, digit_classifier, prototypes, digits, tmp_path
):
    more_hf.erase_classes(model, prototypes, "four", router="random", num_experts=4)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)

    assert forgets(digit_classifier, digits) > 50
    assert forgets(model, digits) == forgets(reloaded, digits) == 0
    assert reloaded.state_dict().keys() == digit_classifier.state_dict().keys()
    assert torch.equal(features(reloaded, digits), features(digit_classifier, digits))
    assert (features(model, digits) - features(reloaded, digits)).abs().max() > 0.1
    assert more_hf.get_erasure(reloaded) is None


def test_pipeline(model, digit_classifier, prototypes, digits):
    """transformers' own pipeline with an image processor, pictures in, names out."""
    plain = {"do_resize": False, "do_rescale": True, "do_normalize": False, "size": 8}
    processor = ViTImageProcessor(rescale_factor=1 / 255, **plain)

    class Grey(ViTImageProcessor):
        def __call__(self, images, **kwargs):
            batch = processor(images, **kwargs)
            batch["pixel_values"] = batch["pixel_values"][:, :1]
            return batch

    fours = digits[0][1200:][digits[1][1200:] == 4][:8, 0]
    pictures = [Image.fromarray((255 * four.numpy()).astype(np.uint8)).convert("RGB") for four in fours]

    def labels(model):
        run = pipeline("image-classification", model=model, image_processor=Grey())
        return [found[0]["label"] for found in run(pictures, top_k=1)]

    assert labels(digit_classifier).count("four") >= 7
    after = labels(more_hf.erase_classes(model, prototypes, "four", remap_to="nine"))
    assert "four" not in after
    assert after.count("nine") >= 4


def test_copies_and_pickles_keep_the_merged_head_and_no_factors(
    model, digit_classifier, prototypes, digits, caplog
):
    more_hf.erase_classes(model, prototypes, "four", router="hash", num_experts=3)
    with caplog.at_level(logging.WARNING):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]

    assert caplog.text.count("without its factors") == 2
    for other in copies:
        (hook,) = other.classifier[1]._forward_pre_hooks.values()
        assert not hasattr(hook, "shifts")
        assert forgets(other, digits) == 0
        assert torch.equal(features(other, digits), features(digit_classifier, digits))
        assert more_hf.get_erasure(other) is None
        with pytest.raises(AlreadyErasedError, match="copy"):
            more_hf.erase_classes(other, prototypes, "five")


@pytest.mark.slow
def test_compiled_models_see_the_edit_and_its_end(digits):
    model, images = token_classifier(), digits[0][:16]
    data = [(digits[0][:100], digits[1][:100])]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(images).logits
        assert more_hf.erase_classes(compiled, data, [4], router="hash", solver="covariance") is compiled
        erased, expected = compiled(images).logits, model(images).logits
        assert more_hf.get_erasure(compiled) is more_hf.get_erasure(model)
        more_hf.restore(compiled)
        after = compiled(images).logits

    torch.testing.assert_close(erased, expected, rtol=1e-5, atol=1e-5)
    assert (erased - before).abs().max() > 1e-3
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # a new name in later versions
def test_gradient_checkpointing(digits):
    images, labels = digits[0][:80], digits[1][:80]
    model = token_classifier(num_hidden_layers=2).train()
    model.gradient_checkpointing_enable()
    model.train()
    more_hf.erase_classes(model, [(images, labels)], [4], router="hash", solver="covariance")
    assert model.training
    assert model.is_gradient_checkpointing

    def gradient():
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        return model.vit.embeddings.patch_embeddings.projection.weight.grad.clone()

    checkpointed = gradient()
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(checkpointed, gradient(), rtol=1e-5, atol=1e-7)
    with more_hf.disabled(model):
        assert (gradient() - checkpointed).abs().max() > 1e-5


# save, load, verify


@pytest.mark.parametrize("router", [None, "random", "hash", "prototype", "prototype_random"])
def test_load_puts_the_hook_back(model, prototypes, digits, tmp_path, router):
    more_hf.erase_classes(model, prototypes, ["four", "one"], router=router, num_experts=3)
    loaded = more_hf.load(more_hf.save(model, tmp_path / "erased", include_delta=True))

    if router == "random":
        with more_hf.routing(model, seeds=range(597)):
            expected = logits(model, digits)
        with more_hf.routing(loaded, seeds=range(597)):
            torch.testing.assert_close(logits(loaded, digits), expected, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(logits(loaded, digits), logits(model, digits), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features(loaded, digits), features(model, digits), rtol=1e-5, atol=1e-6)
    assert str(more_hf.get_erasure(loaded)) == str(more_hf.get_erasure(model))
    assert more_hf.verify(tmp_path / "erased").ok
    with pytest.raises(AlreadyErasedError, match="not available"):
        more_hf.restore(loaded)


def test_a_trained_router_is_saved(model, prototypes, digits, tmp_path):
    more_hf.erase_classes(model, prototypes, "four", router="prototype", num_experts=3)
    router = more_hf.get_erasure(model).hook.router
    untrained = logits(model, digits)
    router.weight = router.weight.flip(0)
    loaded = more_hf.load(more_hf.save(model, tmp_path / "erased", include_delta=True))

    torch.testing.assert_close(logits(loaded, digits), logits(model, digits), rtol=1e-5, atol=1e-5)
    assert (logits(loaded, digits) - untrained).abs().max() > 0.1


def test_without_the_factors_the_record_says_what_was_done(
    model, digit_classifier, prototypes, digits, tmp_path
):
    more_hf.erase_classes(model, prototypes, "four")
    folder = more_hf.save(model, tmp_path / "erased")
    loaded = more_hf.load(folder)

    assert not (folder / DELTA).exists()
    assert forgets(loaded, digits) == 0
    assert torch.equal(features(loaded, digits), features(digit_classifier, digits))
    assert more_hf.get_erasure(loaded).concepts == ["four"]
    assert more_hf.verify(folder).ok
    assert "saved" in more_hf.verify(folder).to_markdown()
    again = more_hf.save(loaded, tmp_path / "again")
    assert more_hf.verify(again).ok
    with pytest.raises(ExportError, match="include_delta=False"):
        more_hf.save(loaded, tmp_path / "factors", include_delta=True)
    for source in (folder, tmp_path / "erased"):
        with pytest.raises(AlreadyErasedError, match="was saved erased"):
            more_hf.erase_classes(AutoModelForImageClassification.from_pretrained(source), prototypes, "five")
    with pytest.raises(AlreadyErasedError):
        more_hf.erase_classes(loaded, prototypes, "five")


def test_saved_over_its_own_folder_then_restored_is_the_original_again(
    digit_classifier, prototypes, digits, tmp_path
):
    digit_classifier.save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    more_hf.save(more_hf.erase_classes(model, prototypes, "four"), tmp_path)
    more_hf.restore(model)

    assert forgets(more_hf.erase_classes(model, prototypes, "four"), digits) == 0
    assert forgets(digit_classifier, digits) > 50
    with pytest.raises(AlreadyErasedError, match="was saved erased"):  # another process that opens the folder
        more_hf.erase_classes(AutoModelForImageClassification.from_pretrained(tmp_path), prototypes, "four")


@pytest.mark.parametrize("include_delta", [False, True])
def test_verify_finds_the_originals_head(model, digit_classifier, prototypes, tmp_path, include_delta):
    more_hf.erase_classes(model, prototypes, "four")
    folder = more_hf.save(model, tmp_path / "erased", include_delta=include_delta)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.1.weight"] = digit_classifier.classifier[1].weight.data
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    failed = [check for check, passed, _ in more_hf.verify(folder).checks if not passed]
    saved = ["every file is the one that was saved", "the edited layers are those that were saved"]
    assert failed == saved + ["each sends p_f where p_t goes"] * include_delta
    with pytest.raises(IncompatibleBaseError, match="trained since"):
        more_hf.load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "original.fp16.safetensors"])
def test_verify_and_save_find_other_weights(model, digit_classifier, prototypes, tmp_path, name):
    more_hf.erase_classes(model, prototypes, "four")
    folder = more_hf.save(model, tmp_path / "erased")
    save_file(digit_classifier.state_dict(), folder / name)
    failed = [check for check, passed, _ in more_hf.verify(folder).checks if not passed]
    assert failed == ["no other weights are in the folder"]
    with pytest.raises(ExportError, match=f"already holds {name}"):
        more_hf.save(model, folder)


def test_variants_and_shards(model, prototypes, tmp_path):
    more_hf.erase_classes(model.half(), prototypes, "four")
    options = {"variant": "fp16", "max_shard_size": "20KB", "include_delta": True}
    folder = more_hf.save(model, tmp_path / "erased", **options)
    assert len(list(folder.glob("model.fp16-*-of-*.safetensors"))) > 1
    assert more_hf.verify(folder).ok
    loaded = more_hf.load(folder)
    assert torch.equal(loaded.classifier[1].weight, model.classifier[1].weight)
    shutil.copy(folder / DELTA, tmp_path / "factors")
    (folder / DELTA).unlink()
    assert more_hf.verify(folder).ok


def test_saving_what_is_not_the_edit_is_refused(model, prototypes, tmp_path):
    with pytest.raises(ExportError, match="Nothing was erased"):
        more_hf.save(model, tmp_path / "model")
    more_hf.erase_classes(model, prototypes, "four")
    original = more_hf.get_erasure(model).originals["classifier.1"]
    edited = model.classifier[1].weight.detach().clone()
    model.classifier[1].weight.data.copy_(original)
    with pytest.raises(MoreError, match="is not the erased model"):
        more_hf.save(model, tmp_path / "model")
    model.classifier[1].weight.data.copy_(edited)
    more_hf.restore(model)
    more_hf.erase_classes(model, prototypes, "four", head="classifier.1")
    assert more_hf.verify(more_hf.save(model, tmp_path / "model")).ok


def test_a_hook_only_edit_is_not_saved(model, digits, tmp_path):
    images, labels = digits
    more_hf.erase_classes(model, [(images, labels)], "four", at="resnet.encoder.stages.1")
    with pytest.raises(ExportError, match="the weights are the original's"):
        more_hf.save(model, tmp_path / "model", include_delta=True)
    assert not (tmp_path / "model").exists()


def test_a_plain_module_is_not_saved(digits, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    more_hf.erase_classes(model, [digits], [4], solver="covariance")
    with pytest.raises(ExportError, match="state_dict"):
        more_hf.save(model, tmp_path / "model")


def two_heads():
    model = token_classifier(DeiTForImageClassificationWithTeacher, DeiTConfig, num_labels=4)
    return model, ["cls_classifier", "distillation_classifier"], (1, 8, 8)


def of_timm():
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_vit", num_labels=4))
    return model, ["timm_model.head"], (3, 160, 160)


@pytest.mark.slow
@pytest.mark.parametrize("build", [two_heads, of_timm])
def test_other_layouts_round_trip(build, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, heads, size = build()
        labels = torch.arange(40) % 4
        images = torch.randn(40, *size) + 2 * torch.randn(4, *size)[labels]
    more_hf.erase_classes(model.eval(), [(images, labels)], [1], router="hash")
    folder = more_hf.save(model, tmp_path / "erased", include_delta=True)
    loaded = more_hf.load(folder)

    assert list(more_hf.get_erasure(loaded).sites) == heads
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=1e-5, atol=1e-5)
    assert more_hf.verify(folder).ok
    record = json.loads((folder / "more_hf.json").read_text())
    sites = more_hf.get_erasure(model).sites
    assert record["sites"] == {head: [4, sites[head].module.in_features] for head in heads}
    assert "matrix" not in json.dumps(record)
