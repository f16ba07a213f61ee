"""Choose the settings of the baselines: the declared grid point with the largest HM on validation images, for
one class.

    python benchmarks/kd/choose.py --dataset fashion-mnist --model allcnn-narrow --forget bag \\
        --models MODELS --output CHOSEN

`CHOSEN/grid.csv` gets a row per grid point as it finishes; a run that was stopped goes on after the last one.
`CHOSEN/settings.json` is for `tuned` in a file of `more-hf bench kd --config`. Choose on a class that the
benchmark does not report.
"""

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from more_hf.core.errors import IncompatibleBaseError
from more_hf.core.files import write_json
from more_hf.core.markdown import markdown_table
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.metrics import harmonic_mean
from more_hf_bench.classes.run import classes_of
from more_hf_bench.classes.training import Recipe, Trainer, accuracy, predict
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.script import argument_parser, best_settings, grid, points_of, search
from more_hf_bench.splits import Splits, split_by_class


# Chosen for one CPU core: the sources train for 3 to 10 epochs and try more rates. A method that reads all of
# D_r gets one epoch and two points; one that reads D_f alone, or a part of D_r, gets three of each.
GRIDS = {
    "finetune": grid(lr=[0.03, 0.1], epochs=1),
    "neggrad": grid(lr=[3e-5, 1e-4, 3e-4, 1e-3, 3e-3], epochs=3),
    "neggrad-plus": grid(lr=[0.003, 0.01], epochs=1),
    "random-labels": grid(lr=[0.01, 0.03], epochs=1),
    "salun": grid(lr=[0.013, 0.03], epochs=1),
    "l1-sparse": grid(lr=[0.03], alpha=[1e-5, 1e-4], epochs=1),
    "fisher": grid(alpha=[1e-8, 1e-7, 1e-6, 1e-5, 1e-4]),
    "boundary-shrink": grid(lr=[3e-4, 1e-3, 3e-3], epochs=3),
    "scrub": grid(lr=[1e-4, 2e-4, 5e-4, 2e-3, 5e-3], epochs=1),
    "bad-teacher": grid(lr=[3e-4, 1e-3, 3e-3]),
    "lau": grid(lr=[1e-3, 1e-2, 1e-1]),
    "esc-t": grid(lr=[1e-3, 1e-2, 1e-1]),
    "kodge": grid(alpha_r=[10.0, 30.0, 100.0, 300.0, 1000.0], alpha_f=[3.0, 10.0, 30.0]),
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data", type=Path, help="where the data are, as of `bench kd`")
    parser.add_argument("--model", required=True, help="a name of more_hf_bench.classes.models.MODELS")
    parser.add_argument("--forget", required=True, help="the class to choose on, or A+B")
    parser.add_argument("--methods", default=",".join(GRIDS))
    parser.add_argument(
        "--models", type=Path, required=True, help="folder of trained classifiers, as of `bench kd`"
    )
    parser.add_argument("--epochs", type=int, help="of the classifier's training, as of `bench kd`")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    data = load_kd_data(args.dataset, path=args.data)
    original = Trainer(args.model, data, Recipe.of(data, epochs=args.epochs), args.models).original(0)
    splits = split_by_class(data, classes_of(args.forget, data))
    points = [point for point in points_of(GRIDS) if point["method"] in args.methods.split(",")]
    args.output.mkdir(parents=True, exist_ok=True)
    rows = search(
        args.output / "grid.csv",
        points,
        lambda missing: (try_out(point["method"], point["settings"], original, splits) for point in missing),
    )
    best = best_settings(rows[::-1], GRIDS, "hm_validation")  # of equals the last
    write_json(args.output / "settings.json", best)
    print(markdown_table(rows))


def try_out(method: str, settings: Mapping[str, Any], original: nn.Module, splits: Splits) -> dict[str, Any]:
    """Measure one grid point: validation accuracies in percent, HM, seconds."""
    start = time.perf_counter()
    try:
        model = CLASSIFICATION[method].load()(copy.deepcopy(original), splits, **settings)
    except IncompatibleBaseError:  # not finite
        acc_f = acc_r = 0.0
    else:
        acc_f, acc_r = (accuracy(predict(model, part), part.labels) for part in (splits.fv, splits.rv))
    return {
        "acc_fv": round(acc_f, 3),
        "acc_rv": round(acc_r, 3),
        "hm_validation": round(harmonic_mean(acc_f, acc_r), 3),
        "seconds": round(time.perf_counter() - start, 2),
    }


if __name__ == "__main__":
    main()
