"""Make a small ViT forget the digit 3: every class's accuracy and the prototypes' cosines, before and after.

    python examples/erase_vit_class.py                              # no download, seconds on two CPU cores
    python examples/erase_vit_class.py --classifier fashion-mnist-vit --forget "ankle boot"

For a classifier of your own it is the same call: more_hf.erase_classes(model, loader, forget=["tench"]).
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForImageClassification

import more_hf
from more_hf.classification.features import collect_prototypes, features_of
from more_hf.core.markdown import markdown_table
from more_hf.data import CLASSIFIERS, load_classifier
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.metrics import class_means, prototype_cosines
from more_hf_bench.classes.training import predict


def class_accuracies(model, data):
    """Percent of each class's images that the model gets right."""
    predicted = predict(model, data)
    classes = range(len(model.config.id2label))
    return [100 * (predicted[data.labels == c] == c).double().mean().item() for c in classes]


def prototypes(model, data):
    """(classes, d): the mean of what the head reads, after its hook if it has one."""
    features, labels = (torch.cat(parts) for parts in zip(*features_of(model, data.loader()), strict=True))
    return class_means(features, labels, len(model.config.id2label))


def picture(names, before, after, maps, forgotten):
    """Bars of the classes' accuracies, and two maps of cosines."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    bars, *axes = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    places = range(len(names))
    bars.bar([place - 0.2 for place in places], before, 0.4, label="before", color="silver")
    bars.bar([place + 0.2 for place in places], after, 0.4, label="after", color="tab:blue")
    bars.set_xticks(places, names, rotation=90)
    bars.set_ylabel("test accuracy, percent")
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axis, (title, cosines) in zip(axes, maps.items(), strict=True):
        shown = axis.imshow(cosines.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(places, names, rotation=90)
        axis.set_yticks(places, names)
        for label in (
            label for c in forgotten for label in (bars.get_xticklabels()[c], axis.get_xticklabels()[c])
        ):
            label.set_color("tab:red")
        figure.colorbar(shown, ax=axis, fraction=0.046)
    return figure


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
offline = [name for name in CLASSIFIERS if not name.startswith("emoji")]
parser.add_argument("--classifier", choices=offline, default="digits-vit", help="ships with the package")
parser.add_argument("--forget", nargs="+", default=["3"], metavar="CLASS")
parser.add_argument(
    "--remap_to",
    nargs="+",
    default="remain",
    metavar="CLASS",
    help="what they become (by default the mean of the others)",
)
parser.add_argument("--limit", type=int, default=2000, help="test images to look at")
parser.add_argument("--output", type=Path, default=Path("without_a_class"), metavar="DIR")
args = parser.parse_args()

data = load_kd_data(args.classifier.rpartition("-")[0])
test = data.test.subset(torch.arange(min(args.limit, len(data.test))))
model = load_classifier(args.classifier)
forgotten = data.class_ids(args.forget)
before, seen_before = class_accuracies(model, test), prototypes(model, test)

fitted = collect_prototypes(model, data.train.loader())  # one pass over the training data
more_hf.erase_classes(model, fitted, args.forget, remap_to=args.remap_to)  # in place, in closed form

after, seen_after = class_accuracies(model, test), prototypes(model, test)
model.save_pretrained(args.output)  # plain transformers: what is saved has forgotten
reloaded = AutoModelForImageClassification.from_pretrained(args.output).eval()
at_rest = class_accuracies(reloaded, test)

rows = [
    {
        "class": name + (" (forgotten)" if c in forgotten else ""),
        "before": before[c],
        "after": after[c],
        "saved and loaded": at_rest[c],
    }
    for c, name in enumerate(data.class_names)
]
maps = {
    "cosines of prototypes, before": prototype_cosines(seen_before, seen_before),
    "before (rows) and after (columns)": prototype_cosines(seen_before, seen_after),
}
picture(data.class_names, before, after, maps, forgotten).savefig(args.output / "before_after.png", dpi=110)
print(f"Test accuracy in percent, {len(test)} images:\n\n{markdown_table(rows)}\n")
print(more_hf.get_erasure(model))  # what was done, and how exact it is
kept = prototype_cosines(prototypes(reloaded, test), seen_before).diagonal()[list(forgotten)]
print(
    "\nThe saved model's predictions have forgotten; its features have not "
    f"(cosine of its forgotten prototypes: {kept.min():.3f})."
)
print(f"Open {args.output / 'before_after.png'}.")
