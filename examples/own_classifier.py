"""Make a classifier of your own forget a class of your own images, and see what that does to every class.

    python examples/own_classifier.py                     # no download: digits as pictures, half a minute
    python examples/own_classifier.py --data my-images --model my-classifier --forget cat

`my-images` has the folders `train/CLASS` and `test/CLASS`; `my-classifier` is a folder or a Hub id, with an
image processor. Without a model a small ResNet is trained first.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

import more_hf
from more_hf.classification.samples import load_samples


def write_digits(folder):
    """Write 1797 small pictures of digits into folders by class; every third is for testing."""
    data = load_digits()
    for i, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        place = folder / ("train" if i % 3 else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 - pixels * 15).astype("uint8")).save(place / f"{i}.png")


def small_resnet(names):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        id2label=dict(enumerate(names)),
    )
    return ResNetForImageClassification(config)


def train(model, loader):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    shuffled = DataLoader(loader.dataset, batch_size=64, shuffle=True, collate_fn=loader.collate_fn)
    for _ in range(6):
        for batch in shuffled:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, metavar="DIR", help="images (digits, written to --output)")
parser.add_argument("--model", help="a folder or a Hub id (a small ResNet, trained here)")
parser.add_argument("--forget", nargs="+", default=["3"], metavar="CLASS")
parser.add_argument("--output", type=Path, default=Path("own_classifier"), metavar="DIR")
args = parser.parse_args()

# 1. The images and the classifier.
data = args.data or args.output / "images"
if args.data is None:
    write_digits(data)
if args.model is None:
    names = sorted(folder.name for folder in (data / "train").iterdir())
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    model = small_resnet(names)
    train(model, load_samples(data, model, processor))
else:
    model = AutoModelForImageClassification.from_pretrained(args.model)
    processor = AutoImageProcessor.from_pretrained(args.model)

# 2. Forget: one pass over the training images, then in closed form, in place.
more_hf.erase_classes(model, load_samples(data, model, processor), args.forget)
print(more_hf.get_erasure(model))

# 3. Look at every class's accuracy on images that neither training nor erasing has seen.
accuracies = more_hf.compare(model, load_samples(data, model, processor, splits=["test"]))
print(f"\n{accuracies}\n")

# 4. Save: `from_pretrained` opens it anywhere, and it has forgotten.
folder = more_hf.save(model, args.output / "forgotten", processor=processor)
print(f"The classifier is in {folder}.")
