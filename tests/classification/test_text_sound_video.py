"""Classifiers of text, sound and video, on batches as their processors give them."""

import pytest
import torch
from support.classifiers import sound_classifier, text_classifier, video_classifier
from support.compare import same, state
from transformers import LlamaConfig, LlamaForSequenceClassification

import more_hf


CLASSES, SAMPLES = 3, 4
LABELS = torch.arange(CLASSES).repeat_interleave(SAMPLES)


def text(**options):
    """Texts of two lengths, padded on the right, as a tokenizer gives them."""
    model = text_classifier(num_labels=CLASSES, **options)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (len(LABELS), 6), generator=draw)
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    return model, {"input_ids": ids * mask, "attention_mask": mask, "text": ["not for the model"] * len(ids)}


def noise(*shape):
    return torch.randn(len(LABELS), *shape, generator=torch.Generator().manual_seed(0))


MODELS = {
    "bert": text,
    "llama": lambda: text(cls=LlamaForSequenceClassification, config=LlamaConfig),
    "wav2vec2": lambda: (sound_classifier(num_labels=CLASSES), {"input_values": noise(80)}),
    "videomae": lambda: (video_classifier(num_labels=CLASSES), {"pixel_values": noise(2, 3, 8, 8)}),
}


@pytest.fixture(params=MODELS)
def built(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = MODELS[request.param]()
    return model.eval(), {**inputs, "labels": LABELS}


def logits(model, batch):
    named = {name: value for name, value in batch.items() if name not in ("labels", "text")}
    with torch.no_grad():
        return model(**named).logits


def means(rows):
    return torch.stack([rows[LABELS == label].mean(0) for label in range(CLASSES)])


def test_a_class_is_sent_to_another_and_comes_back(built, tmp_path):
    model, batch = built
    before, weights = logits(model, batch), state(model)
    more_hf.erase_classes(model, [batch], forget=[1], remap_to=[2])

    # The head is linear and E μ_f = μ_t: the mean logits become the target's, and the others stay.
    edited = logits(model, batch)
    expected = means(before)[[0, 2, 2]]
    torch.testing.assert_close(means(edited), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(means(before), expected, rtol=1e-2)

    more_hf.save(model, tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain, batch), edited, rtol=1e-4, atol=1e-5)
    assert type(more_hf.load(tmp_path)) is type(model)
    assert more_hf.verify(tmp_path).ok

    more_hf.restore(model)
    assert same(model, weights)


def test_a_language_model_is_read_at_the_token_that_it_classifies_by():
    model, batch = MODELS["llama"]()
    batch["labels"] = LABELS
    found = more_hf.collect_prototypes(model, [batch]).matrix.T

    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        hidden = model.eval().model(input_ids=ids, attention_mask=mask).last_hidden_state
    last = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
    torch.testing.assert_close(found.float(), means(last), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.float(), means(hidden.mean(1)), rtol=1e-2)


def test_what_is_no_classifier_of_one_class_a_sample_is_refused():
    model, batch = MODELS["bert"]()
    weights = state(model)
    for wrong, words in (
        ({**batch, "labels": torch.nn.functional.one_hot(LABELS)}, "one class number per sample"),
        ({"sentence": ["a"] * 12, "labels": LABELS}, "nothing that the model reads"),
    ):
        with pytest.raises(more_hf.MoreError, match=words):
            more_hf.erase_classes(model, [wrong], forget=[1])
    regression = text_classifier(num_labels=1)
    with pytest.raises(more_hf.MoreError, match="nothing remains"):
        more_hf.erase_classes(regression, [{**batch, "labels": LABELS * 0}], forget=[0])
    assert same(model, weights)
