"""Choose the settings of the trained baselines: the declared grid point with the largest HM on validation
images, for one class.

    python benchmarks/kd/choose.py --dataset fashion-mnist --model allcnn-narrow --forget bag \\
        --models MODELS --output CHOSEN

`CHOSEN/grid.csv` gets a row per grid point as it finishes; a run that was stopped goes on after the last one.
`CHOSEN/settings.json` is for `tuned` in a file of `more-hf bench kd --config`. Choose on a class that the
benchmark does not report.
"""

import argparse
import copy
import itertools
import json
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
from more_hf_bench.classes.training import Recipe, Trainer, accuracy, predict
from more_hf_bench.columns import read_cells, write_rows
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.splits import Splits, split_by_class


# Chosen for one CPU core: the sources train for 3 to 10 epochs and try more rates. A method that reads all of
# D_r gets one epoch and two points; one that reads D_f alone, or a part of D_r, gets three of each.
WHOLE, FORGOTTEN = {"epochs": [1]}, {"epochs": [3]}
GRIDS = {
    "finetune": {"lr": [0.03, 0.1], **WHOLE},
    "neggrad": {"lr": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3], **FORGOTTEN},
    "neggrad-plus": {"lr": [0.003, 0.01], **WHOLE},
    "random-labels": {"lr": [0.01, 0.03], **WHOLE},
    "salun": {"lr": [0.013, 0.03], **WHOLE},
    "l1-sparse": {"lr": [0.03], "alpha": [1e-5, 1e-4], **WHOLE},
    "fisher": {"alpha": [1e-8, 1e-7, 1e-6, 1e-5, 1e-4]},
    "boundary-shrink": {"lr": [3e-4, 1e-3, 3e-3], **FORGOTTEN},
    "scrub": {"lr": [1e-4, 2e-4, 5e-4, 2e-3, 5e-3], **WHOLE},
    "bad-teacher": {"lr": [3e-4, 1e-3, 3e-3]},
    "lau": {"lr": [1e-3, 1e-2, 1e-1]},
    "esc-t": {"lr": [1e-3, 1e-2, 1e-1]},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", required=True, help="a name of more_hf_bench.classes.models.MODELS")
    parser.add_argument("--forget", required=True, help="the class to choose on")
    parser.add_argument("--methods", default=",".join(GRIDS))
    parser.add_argument(
        "--models", type=Path, required=True, help="folder of trained classifiers, as of `bench kd`"
    )
    parser.add_argument("--epochs", type=int, help="of the classifier's training, as of `bench kd`")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    data = load_kd_data(args.dataset)
    original = Trainer(args.model, data, Recipe.of(data, args.epochs), args.models).original(0)
    splits = split_by_class(data, [args.forget])
    path = args.output / "grid.csv"
    rows = read_cells(path)
    done = {(row["method"], row["settings"]) for row in rows}
    for method in args.methods.split(","):
        for values in itertools.product(*GRIDS[method].values()):
            settings = dict(zip(GRIDS[method], values, strict=True))
            if (method, json.dumps(settings)) not in done:
                rows.append(try_out(method, settings, original, splits))
                write_rows(path, rows)

    chosen = {}
    for row in sorted(rows, key=lambda row: float(row["hm_validation"])):
        chosen[row["method"]] = json.loads(row["settings"])  # the last one is the best
    write_json(args.output / "settings.json", chosen)
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
        "method": method,
        "settings": json.dumps(settings),
        "acc_fv": round(acc_f, 3),
        "acc_rv": round(acc_r, 3),
        "hm_validation": round(harmonic_mean(acc_f, acc_r), 3),
        "seconds": round(time.perf_counter() - start, 2),
    }


if __name__ == "__main__":
    main()
