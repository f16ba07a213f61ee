import gzip
import io
import json
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from sklearn.datasets import load_digits

from more_hf_bench.classes import sources as kd_sources
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.errors import BenchmarkError
from more_hf_bench.splits import split_by_class, split_by_sample


@pytest.fixture(scope="module")
def digits():
    return load_kd_data("digits")


def colours(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    file = io.BytesIO()
    Picture.fromarray(array).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def write_parquet(folder, split, columns, names, shape, count):
    """A split as the Hub has it: one parquet file of images and labels. Returns what was written."""
    image, label = columns
    pixels, labels = colours((count, *shape), seed=len(split)), [i % len(names) for i in range(count)]
    features = Features({image: Image(), label: ClassLabel(names=names)})
    data = Dataset.from_dict({image: [png(p) for p in pixels], label: labels}, features=features)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return pixels, labels


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BenchmarkError, match=r"scikit-learn.*pip install 'more_hf\[bench\]'"):
        load_kd_data("digits")


def test_digits_are_scikit_learns(digits):
    """Every image of scikit-learn is in exactly one part, scaled from 0..16 to [-1, 1], under its label."""
    raw = load_digits()
    pairs = zip(raw.images, raw.target, strict=True)
    expected = sorted((*(image / 8 - 1).round(2).ravel(), label) for image, label in pairs)
    found = []
    for part in (digits.train, digits.validation, digits.test):
        batch = part[torch.arange(len(part))]
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["pixel_values"].shape == (len(part), 1, 8, 8)
        rows = batch["pixel_values"].flatten(1).double().numpy()
        found += [(*row, label) for row, label in zip(rows, batch["labels"].tolist(), strict=True)]
    found = sorted((*np.round(row[:-1], 2), row[-1]) for row in found)
    np.testing.assert_allclose(found, expected, atol=0.011)
    assert digits.class_names == tuple("0123456789")


def test_parts_are_disjoint_stratified_and_seeded(digits):
    train, validation = set(digits.train.rows.tolist()), set(digits.validation.rows.tolist())
    assert not train & validation
    counts = torch.bincount(torch.cat([digits.train.labels, digits.validation.labels]))
    assert torch.bincount(digits.validation.labels).tolist() == [round(0.1 * n) for n in counts.tolist()]
    again, other = load_kd_data("digits"), load_kd_data("digits", seed=1)
    assert again.validation.rows.equal(digits.validation.rows)
    assert not other.validation.rows.equal(digits.validation.rows)
    assert other.test.rows.equal(digits.test.rows)


def test_one_image_many_images_and_loader_agree(digits):
    part = digits.test.subset(torch.arange(50, 70))
    many = part[torch.arange(20)]
    one = part[3]
    assert one["pixel_values"].shape == (1, 8, 8)
    assert one["labels"].shape == ()
    assert one["pixel_values"].equal(many["pixel_values"][3])
    batches = list(part.loader(8))
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 4]
    assert torch.cat([batch["pixel_values"] for batch in batches]).equal(many["pixel_values"])
    shuffled = [torch.cat([batch["labels"] for batch in part.loader(8, seed=seed)]) for seed in (0, 0, 1)]
    assert shuffled[0].equal(shuffled[1])
    assert not shuffled[0].equal(shuffled[2])
    assert shuffled[0].sort().values.equal(many["labels"].sort().values)


def test_size_channels_and_normalisation():
    plain = load_kd_data("digits").test[0]["pixel_values"]
    data = load_kd_data("digits", image_size=16, channels=3, mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.5))
    pixels = data.test[0]["pixel_values"]
    assert data.channels == 3
    assert pixels.shape == (3, 16, 16)
    larger = {"size": (16, 16), "mode": "bilinear", "antialias": True}
    grey = torch.nn.functional.interpolate((plain / 2 + 0.5)[None], **larger)[0, 0]
    torch.testing.assert_close(pixels, torch.stack([(grey - 0.5) / 0.5, grey, (grey - 0.25) / 0.5]))


@pytest.mark.parametrize("forget", [["3"], [3], ["0", 8]])
def test_split_by_class(digits, forget):
    splits, ids = split_by_class(digits, forget), {int(c) for c in forget}
    sides = ((splits.f, splits.r), (splits.fv, splits.rv), (splits.ft, splits.rt))
    for part, (forgotten, remaining) in zip(
        (digits.train, digits.validation, digits.test), sides, strict=True
    ):
        assert set(forgotten.labels.tolist()) == ids
        assert not set(remaining.labels.tolist()) & ids
        assert torch.cat([forgotten.rows, remaining.rows]).sort().values.equal(part.rows)
        assert forgotten.images is part.images  # no copy


def test_split_by_sample(digits):
    splits, other = split_by_sample(digits, 0.1, seed=0), split_by_sample(digits, 0.1, seed=1)
    assert len(splits.f) == round(0.1 * len(digits.train))
    assert torch.cat([splits.f.rows, splits.r.rows]).sort().values.equal(digits.train.rows)
    assert not splits.f.rows.equal(other.f.rows)
    assert splits.f.rows.equal(split_by_sample(digits, 0.1, seed=0).f.rows)
    assert (len(splits.ft), len(splits.fv)) == (0, 0)
    assert splits.rt is digits.test
    assert splits.f[0]["labels"] == digits.train.labels[digits.train.rows == splits.f.rows[0]].item()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: split_by_class(d, ["ten"]), "no class 'ten'"),
        (lambda d: split_by_class(d, ["00"]), "Did you mean '0'"),
        (lambda d: split_by_class(d, [10]), "no class 10"),
        (lambda d: split_by_class(d, ["3", 3]), "twice"),
        (lambda d: split_by_class(d, []), "0 of the 10"),
        (lambda d: split_by_class(d, list(range(10))), "leave at least one"),
        (lambda d: split_by_sample(d, 1.0), "forgets 1295 of 1295"),
        (lambda d: load_kd_data("digitz"), "no data set 'digitz'"),
        (lambda d: load_kd_data("digits", channels=4), "1 channels, not 4"),
        (lambda d: load_kd_data("emoji-100"), "None has no images.npz"),
    ],
)
def test_errors(digits, call, message):
    with pytest.raises(BenchmarkError, match=message):
        call(digits)


def test_fashion_mnist_from_idx_files(tmp_path, monkeypatch):
    """Small files by the format's description: the reader has to find shape, bytes and labels."""
    written = {}
    for part, count in (("train", 20), ("t10k", 10)):
        pixels, labels = colours((count, 28, 28), seed=count), np.arange(count, dtype=np.uint8) % 10
        files = {f"{part}-images-idx3-ubyte.gz": pixels, f"{part}-labels-idx1-ubyte.gz": labels}
        for name, array in files.items():
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / name).write_bytes(gzip.compress(head + array.tobytes()))
        written[part] = pixels
    data = load_kd_data("fashion-mnist", path=tmp_path, validation=0.5)
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 10, 10)
    np.testing.assert_array_equal(data.test.images[:, 0].numpy(), written["t10k"])
    np.testing.assert_array_equal(data.train.images[:, 0].numpy(), written["train"])
    assert data.test.labels.tolist() == list(range(10))
    assert data.class_names[9] == "ankle boot"

    # The smaller set is the beginning of the same training images, all of its test images, and not mirrored.
    monkeypatch.setattr(kd_sources, "LEARNT_BY_HEART", 12)
    small = load_kd_data("fashion-mnist-6000", path=tmp_path, validation=0.0)
    np.testing.assert_array_equal(small.train.images[:, 0].numpy(), written["train"][:12])
    assert small.train.labels.tolist() == [*range(10), 0, 1]
    assert len(small.test) == 10
    assert data.flip
    assert not small.flip


def test_fashion_mnist_from_parquet(tmp_path, monkeypatch):
    """Where Debian's files are not, the Hub's columns are read; here from a local copy."""
    monkeypatch.setattr(kd_sources, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    for split in ("train", "test"):
        pixels, _ = write_parquet(tmp_path, split, ("image", "label"), list("abcdefghij"), (28, 28), 20)
    data = load_kd_data("fashion-mnist", path=tmp_path)
    assert data.channels == 1
    assert data.class_names[0] == "T-shirt or top"
    np.testing.assert_array_equal(data.test.images[:, 0].numpy(), pixels)


@pytest.mark.parametrize(
    ("name", "columns", "test", "size"),
    [
        ("cifar10", ("img", "label"), "test", 32),
        ("cifar100", ("img", "fine_label"), "test", 32),
        ("tiny-imagenet", ("image", "label"), "valid", 64),
        ("imagenet-1k", ("image", "label"), "validation", 224),
    ],
)
def test_hub_data_sets(tmp_path, name, columns, test, size):
    names = ["cat", "dog", "owl"]
    for split in ("train", test):
        pixels, labels = write_parquet(tmp_path, split, columns, names, (size, size, 3), 12)
    data = load_kd_data(name, path=tmp_path, validation=0.25)
    assert data.class_names == tuple(names)
    assert (len(data.train), len(data.validation)) == (9, 3)
    assert data.test.labels.tolist() == labels
    batch = data.test[torch.tensor([5, 2])]["pixel_values"]
    expected = torch.from_numpy(pixels[[5, 2]]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(batch, expected)
    # ImageNet is not read into memory
    assert isinstance(data.train.images, torch.Tensor) == (name != "imagenet-1k")


@pytest.mark.parametrize("test", ["test", "validation"])
def test_a_folder_of_images(tmp_path, test):
    """The shorter side is resized, the centre taken: here of white pictures a red middle."""
    for split in ("train", test):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                picture = Picture.new("RGB", (60, 20), "white")
                picture.paste("red", (20, 0, 40, 20))
                picture.save(tmp_path / split / name / f"{i}.png")
    data = load_kd_data(str(tmp_path), image_size=8, validation=0.25)
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 2, 8)
    pixels = data.test[torch.arange(8)]["pixel_values"]
    assert pixels.shape == (8, 3, 8, 8)
    red = torch.tensor([1.0, -1.0, -1.0])
    torch.testing.assert_close(pixels[..., 2:-2].mean((0, 2, 3)), red, atol=0.02, rtol=0)


def test_a_folder_without_test_images(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Picture.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(BenchmarkError, match="train/CLASS and test/CLASS"):
        load_kd_data(str(tmp_path))


@pytest.fixture
def rendered(tmp_path):
    """As benchmarks/emoji_sd/data.py writes it: ten drawings of most of 102 things, one colour per thing."""
    things = [f"thing-{i}" for i in range(102)]
    names = ["not-chosen", *things]
    of_drawing = [name for i in range(103) for name in [i] * (3 if i in (1, 2) else 10)]
    colour = np.random.default_rng(0).integers(0, 200, (103, 3), dtype=np.uint8)
    images = np.broadcast_to(colour[of_drawing][:, None, None], (len(of_drawing), 64, 64, 3)).copy()
    # every drawing is a little different
    images[:, :, :, 0] += (np.arange(len(of_drawing)) % 50).astype(np.uint8)[:, None, None]
    artists = np.zeros(len(of_drawing))
    np.savez(tmp_path / "images.npz", images=images, artist=artists, name=np.array(of_drawing))
    (tmp_path / "meta.json").write_text(json.dumps({"names": names, "things": things}))
    return tmp_path


@pytest.mark.slow
def test_emoji_100(rendered):
    data = load_kd_data("emoji-100", path=rendered, image_size=8)
    # the two that fewest artists drew are left out
    assert data.class_names == tuple(f"thing {i}" for i in range(2, 102))
    assert len(data.train) + len(data.validation) == 100 * 8 * 25
    assert len(data.test) == 100 * 2 * 5
    assert data.test.images.shape == (1000, 3, 8, 8)
    again = load_kd_data("emoji-100", path=rendered, image_size=8)
    assert again.train.images.equal(data.train.images)
    # The views of one drawing differ; its colour is still nearest to its own class nearly always.
    views = data.test.images[:5].double()
    assert all(not views[0].equal(view) for view in views[1:])
    middle = data.train.images[:, :, 3:5, 3:5].double().mean((2, 3))
    of_rows = middle[data.train.rows]
    centres = torch.stack([of_rows[data.train.labels == label].mean(0) for label in range(100)])
    nearest = torch.cdist(data.test.images[:, :, 3:5, 3:5].double().mean((2, 3)), centres).argmin(1)
    right = (nearest == data.test.labels).double().mean()
    wrong = (nearest == data.test.labels.roll(10)).double().mean()
    assert right > 10 * max(wrong, 0.01)


def test_emoji_holds_out_drawings(rendered, monkeypatch):
    """Without moving or recolouring, no image of the test set is one of the training set."""

    def unmoved(pixels, generator):
        return ((pixels + 1) * 127.5).round().to(torch.uint8)

    monkeypatch.setattr(kd_sources, "views", unmoved)
    data = load_kd_data("emoji-100", path=rendered, image_size=2)

    def seen(part):
        pairs = zip(part.rows.tolist(), part.labels.tolist(), strict=True)
        return {(*part.images[row].flatten().tolist(), label) for row, label in pairs}

    train, test = seen(data.train), seen(data.test)
    assert len(test) == 200
    assert not train & test
