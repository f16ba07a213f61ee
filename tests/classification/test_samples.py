"""Files and data sets of every kind become batches for a classifier; `more-hf erase-classes` reads them."""

import av
import numpy as np
import pytest
import soundfile
import torch
from datasets import ClassLabel, Dataset, Features, Value
from support.classifiers import sound_classifier, text_classifier, video_classifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, VideoMAEVideoProcessor, Wav2Vec2FeatureExtractor

import more_hf
from more_hf.classification.samples import load_samples
from more_hf.cli.main import main


NAMES = ["bad", "good", "so so"]
WORDS = ["[PAD]", "[UNK]", *"a bit more or less than the film that I saw once".split()]
LABELS = torch.tensor([0, 1, 2] * 4)


def write_text(path, text):
    path.with_suffix(".txt").write_text(text)


def write_sound(path, wave):
    soundfile.write(path.with_suffix(".wav"), wave, 16_000, subtype="FLOAT")


def write_film(path, frames):
    with av.open(path.with_suffix(".avi"), "w") as film:
        stream = film.add_stream("png", rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())


def of_texts(draw):
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    processor = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    samples = [" ".join(draw.choice(WORDS[2:], 3 + i % 4)) for i in range(len(LABELS))]
    return text_classifier, processor, write_text, samples, processor(samples, padding=True)


def of_sounds(draw):
    processor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    samples = [draw.normal(size=200 + 16 * (i % 3)).astype(np.float32) for i in range(len(LABELS))]
    return (
        sound_classifier,
        processor,
        write_sound,
        samples,
        processor(samples, padding=True, sampling_rate=16_000),
    )


def of_films(draw):
    processor = VideoMAEVideoProcessor(do_resize=False, do_center_crop=False)
    samples = [draw.integers(256, size=(4, 8, 8, 3), dtype=np.uint8) for _ in LABELS]
    # two frames of four, evenly
    return video_classifier, processor, write_film, samples, processor([film[::2] for film in samples])


@pytest.fixture(params=[of_texts, of_sounds, of_films])
def saved(request, tmp_path):
    """The folder of a model, that of its samples in folders by class, and what the model is called with."""
    build, processor, write, samples, inputs = request.param(np.random.default_rng(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(id2label=dict(enumerate(NAMES))).eval()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for i, (sample, label) in enumerate(zip(samples, LABELS.tolist(), strict=True)):
        folder = tmp_path / "data" / ("train" if i < 9 else "test") / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / str(i), sample)
    return model, tmp_path, {name: torch.as_tensor(np.array(value)) for name, value in inputs.items()}


def means(model, inputs):
    """The mean logits of each class over the first nine samples."""
    with torch.no_grad():
        logits = model(**inputs).logits[:9]
    return torch.stack([logits[LABELS[:9] == label].mean(0) for label in range(3)])


def test_a_folder_of_files_by_the_command(saved, capsys):
    model, place, inputs = saved
    words = f"--data {place / 'data'} --test {place / 'data'} --forget GOOD --remap_to bad --batch_size 9"
    argv = ["erase-classes", str(place / "model"), *words.split(), "--output", str(place / "out")]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "|     1 | good      | bad     |" in err
    assert "2 classes stay: bad, so so" in err
    assert "Reading 9 " in err
    assert "Percent of the 3 " in out

    before, after = means(model, inputs), means(more_hf.load(place / "out").eval(), inputs)
    torch.testing.assert_close(after, before[[0, 0, 2]], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(before, after, rtol=1e-2)
    assert more_hf.verify(place / "out").ok
    assert main(["push", str(place / "out"), "me/it", "--dry_run", str(place / "push")]) == 0
    card = (place / "push" / "README.md").read_text("utf-8")
    assert "image" not in card.split("## What was done")[0]
    assert "(before_after.png)" in card
    assert "Not pushed" not in capsys.readouterr().err


@pytest.fixture
def texts(tmp_path):
    build, processor, _, samples, _ = of_texts(np.random.default_rng(0))
    return build(id2label=dict(enumerate(NAMES))), processor, samples, tmp_path


def loaded(data, model, processor):
    """All inputs and labels, as one batch."""
    (batch,) = load_samples(data, model, processor, batch_size=100)
    return batch


def test_what_datasets_opens(texts):
    model, processor, samples, place = texts
    expected = torch.as_tensor(processor(samples, padding=True)["input_ids"])
    own_order = Features({"text": Value("string"), "label": ClassLabel(names=["SO SO", "1", "bad"])})
    named = Dataset.from_dict({"text": samples, "label": [NAMES[i] for i in LABELS]})
    numbered = Dataset.from_dict({"review": samples, "labels": LABELS.tolist()})
    reordered = Dataset.from_dict({"text": samples, "label": (2 - LABELS).tolist()}, features=own_order)
    named.to_csv(place / "csv" / "train.csv")
    named.save_to_disk(place / "disk")
    for data in (named, numbered, reordered, place / "csv", place / "disk"):
        batch = loaded(data, model, processor)
        assert torch.equal(batch["input_ids"], expected)
        assert torch.equal(batch["labels"], LABELS)


def test_what_cannot_be_read(texts, monkeypatch):
    model, processor, samples, place = texts
    columns = {"text": samples, "label": ["great"] * len(samples)}
    for data, words in (
        (Dataset.from_dict(columns), "no class 'great'. It has 'bad'"),
        (Dataset.from_dict({"text": samples}), "texts without labels: its columns are text"),
        (Dataset.from_dict({"a": samples, "b": samples, "label": LABELS.tolist()}), "2 columns of texts"),
    ):
        with pytest.raises(more_hf.PrototypeError, match=words):
            load_samples(data, model, processor)
    (place / "bad").mkdir()
    write_sound(place / "bad" / "0", np.zeros(100))
    sounds = load_samples(
        place, sound_classifier(id2label=dict(enumerate(NAMES))), Wav2Vec2FeatureExtractor()
    )
    monkeypatch.setattr("more_hf.classification.kinds.load_audio", missing)
    with pytest.raises(more_hf.MoreError, match="pip install soundfile soxr"):
        next(iter(sounds))


def missing(*args, **kwargs):
    raise ImportError("no reader")
