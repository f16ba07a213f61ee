"""Draw the training curves: LOG.csv, as a training script wrote it, becomes LOG.png beside it.

python curves.py logs/*.csv
"""

import csv
from pathlib import Path

import matplotlib

from more_hf_bench.script import argument_parser


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def draw(log: Path) -> Path:
    """Every logged value over the steps, one panel each; losses on a logarithmic axis."""
    with open(log) as file:
        lines = [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]
    names = [name for name in lines[0] if name not in ("step", "seconds", "learning_rate")]
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(4 * len(names), 3), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=0.8)
        axis.set(xlabel="step", title=name, yscale="linear" if name.endswith("_acc") else "log")
        axis.grid(alpha=0.3)
    picture = log.with_suffix(".png")
    figure.savefig(picture, dpi=80)
    pyplot.close(figure)
    return picture


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("logs", type=Path, nargs="+", help="log.csv files")
    for log in parser.parse_args().logs:
        print(draw(log))


if __name__ == "__main__":
    main()
