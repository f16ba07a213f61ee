"""Train a classifier of the knowledge-deletion benchmark; run it again to resume. Also through `accelerate
launch`.

    python benchmarks/classifiers/train.py --dataset fashion-mnist --model allcnn-narrow --output RUN

`RUN/model` is what `save_pretrained` writes, `RUN/log.csv` has a row per epoch. `--package NAME` also writes
the model in half precision to `more_hf/data/classifiers/NAME`, measures the one that is loaded from there,
and puts that row into `classifiers.csv` and the README's table.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.data import load_classifier
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.models import MODELS, build_classifier, load_pretrained, pretrained_inputs
from more_hf_bench.classes.training import Recipe, accuracy, predict, train_classifier
from more_hf_bench.columns import read_cells, write_rows
from more_hf_bench.machine import hardware, processes
from more_hf_bench.script import argument_parser
from more_hf_bench.splits import ImageSet, KDData


HERE = Path(__file__).parent
PACKAGED = HERE.parents[1] / "more_hf" / "data" / "classifiers"
CHOICES = ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "shift", "seed")
README_COLUMNS = (
    "name", "dataset", "model", "parameters", "kilobytes", "accuracy_training", "accuracy_test", "epochs",
    "minutes",
)  # fmt: skip


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="a name of load_kd_data, or a folder of images")
    parser.add_argument("--data", type=Path, help="where the data lie, if not in their usual place")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--model", choices=MODELS, help="random weights")
    weights.add_argument("--pretrained", help="a folder or Hub id to start from; images are made to fit it")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--package", metavar="NAME", help="also put it into the package")
    for name in CHOICES:
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name}", type=type(default), help="the data set's own recipe by default")
    precisions = ("no", "fp16", "bf16")
    parser.add_argument("--mixed_precision", choices=precisions, help="on CUDA (as accelerate is configured)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    inputs = pretrained_inputs(args.pretrained) if args.pretrained else {}
    data = load_kd_data(args.dataset, path=args.data, workers=args.workers, **inputs)
    start = load_pretrained if args.pretrained else build_classifier
    given = {name: value for name in CHOICES if (value := getattr(args, name)) is not None}
    recipe = Recipe.of(data, args.pretrained, **given)
    model = start(args.pretrained or args.model, data, seed=recipe.seed)
    model = train_classifier(
        model,
        data.train,
        recipe,
        output=args.output,
        validation=data.validation,
        mixed_precision=args.mixed_precision,
    )
    if processes().is_main_process:
        fitted, test = (measured_accuracy(model, part) for part in (data.train, data.test))
        print(f"training accuracy {fitted:.2f} %, test accuracy {test:.2f} %")
        if args.package:
            package(args, data, model, recipe)


def measured_accuracy(model: PreTrainedModel, images: ImageSet) -> float:
    return accuracy(predict(model, images), images.labels)


def package(args: argparse.Namespace, data: KDData, model: PreTrainedModel, recipe: Recipe) -> None:
    """Write the model in half precision, and the row of the one that is loaded from there."""
    device, folder = next(model.parameters()).device, PACKAGED / args.package
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    loaded = load_classifier(args.package).to(device)
    seconds = float(read_cells(args.output / "log.csv")[-1]["seconds"])
    row = {
        "name": args.package,
        "dataset": args.dataset,
        "model": args.model or args.pretrained,
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "kilobytes": (folder / "model.safetensors").stat().st_size // 1000,
        "accuracy_training": round(measured_accuracy(loaded, data.train), 2),
        "accuracy_validation": round(measured_accuracy(loaded, data.validation), 2),
        "accuracy_test": round(measured_accuracy(loaded, data.test), 2),
        "epochs": recipe.epochs,
        "minutes": round(seconds / 60, 1),
        "hardware": hardware(device),
        "command": shlex.join(["python", "benchmarks/classifiers/train.py", *portable(sys.argv[1:])]),
    }
    table = HERE / "classifiers.csv"
    others = [other for other in read_cells(table) if other["name"] != args.package]
    write_rows(table, sorted([*others, row], key=lambda row: row["name"]))
    rows = read_cells(table)  # all cells as they were written
    readme = HERE / "README.md"
    before, _, after = readme.read_text("utf-8").partition("<!-- classifiers.csv -->\n")
    after = after.partition("<!-- end -->\n")[2]
    commands = "\n".join(row["command"] for row in rows)
    body = f"{markdown_table(rows, README_COLUMNS)}\n\n```bash\n{commands}\n```\n"
    write_text(readme, f"{before}<!-- classifiers.csv -->\n{body}<!-- end -->\n{after}")


def portable(arguments: list[str]) -> list[str]:
    """The command without this machine's folders."""
    paths = {"--output": "RUN", "--data": "DATA"}
    return [
        paths.get(before, argument) for before, argument in zip(["", *arguments], arguments, strict=False)
    ]


if __name__ == "__main__":
    main()
