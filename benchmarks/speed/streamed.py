"""Forget 1, 10 and 100 of a thousand classes, on features that are streamed: ours, ESC's and UCE's solves.

    OMP_NUM_THREADS=1 python benchmarks/speed/streamed.py    # streamed.csv, .md and .png; ten minutes

1.15 million features of 768 numbers, and a tenth of them of 4,096, made batch by batch and never kept. A pass
takes as long for each feature whatever their number; making them is not counted. `esc` reads the features of
the forgotten classes, `uce` the means, as we do. Seconds are of the processor. A width that is in the CSV
file is not measured again.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from many_classes import BATCH, HERE, Classifier
from matplotlib.figure import Figure
from torch import Tensor

import more_hf
from more_hf.core.prototypes import PrototypeFitter
from more_hf_bench.columns import read_cells, write_rows
from more_hf_bench.figures import write_figure
from more_hf_bench.machine import hardware, peak_memory, processes
from more_hf_bench.methods.diffusion.closed_form import edit_matrix
from more_hf_bench.script import argument_parser, write_table


CLASSES, FORGOTTEN = 1000, (1, 10, 100)
SIZES = {768: 1_150_000, 4096: 115_000}  # width -> features
SOLVES = {"ours": "tab:blue", "esc": "tab:orange", "uce": "tab:green"}


class Measured:
    """Lines of the table; what is timed may be stopped and go on."""

    def __init__(self, width: int, features: int):
        self.size = {"width": width, "features": features}
        self.lines: list[dict] = []

    @contextmanager
    def part(self, what: str, forgotten: int | None = None) -> Iterator[list[float]]:
        """Add the seconds that the block appends to what it gets."""
        seconds: list[float] = []
        with peak_memory(torch.device("cpu")) as peak:
            yield seconds
        line = {"what": what, **self.size, "forgotten": "" if forgotten is None else forgotten}
        self.lines.append(
            {**line, "seconds": round(sum(seconds), 3), "MiB at most": round(peak.mebibytes or 0)}
        )
        print(self.lines[-1], flush=True)


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds.append(time.process_time() - start)


def stream(labels: Tensor, means: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Features around the means of their classes, with a spectrum that falls as 1/i, and labels."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, means.shape[1] + 1).rsqrt()
    for own in labels.split(BATCH):
        noise = torch.randn(len(own), means.shape[1], generator=generator)
        yield means[own] + noise * spectrum, own


def measure(width: int, features: int, classes: int, forgets: tuple[int, ...]) -> list[dict]:
    """A line for each part."""
    measured = Measured(width, features)
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(1)) + 1
    labels = torch.arange(features) % classes
    for what, second_moment in (("a pass, means", False), ("a pass, means and Σ", True)):
        fitter = PrototypeFitter(width, [str(c) for c in range(classes)])
        with measured.part(what) as seconds:
            for z, y in stream(labels, means):
                with timed(seconds):
                    fitter.update(z, y)
                    if second_moment:
                        fitter.update_moment(z)
    prototypes = fitter.prototypes

    for forgotten in forgets:
        with measured.part("ours", forgotten) as seconds:
            model = Classifier(width, classes).eval()
            with timed(seconds):
                more_hf.erase_classes(model, prototypes, list(range(forgotten)), head="head", most_lost=100)
        with measured.part("esc", forgotten) as seconds:
            total = torch.zeros(width, width, dtype=torch.float64)
            for z, _ in stream(labels[labels < forgotten], means):
                with timed(seconds):
                    total += z.double().T @ z.double()
            with timed(seconds):
                torch.linalg.eigh(total)
        with measured.part("uce", forgotten) as seconds, timed(seconds):
            P = prototypes.matrix.T
            targets = P[forgotten:].mean(0).expand(forgotten, -1)
            A = edit_matrix(
                P[:forgotten], targets, P[forgotten:], erase_scale=1.0, preserve_scale=0.1, lamb=0.5
            )
            model.head.weight.data = (model.head.weight.double() @ A).float()
    return measured.lines


def draw(lines: list[dict]) -> Figure:
    """Seconds over the number of forgotten classes; the pass is level."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for width, style in zip(dict.fromkeys(line["width"] for line in lines), ("-", "--"), strict=False):
        of_width = [line for line in lines if line["width"] == width]
        for what, color in SOLVES.items():
            own = [line for line in of_width if line["what"] == what]
            x, y = [int(line["forgotten"]) for line in own], [float(line["seconds"]) for line in own]
            axis.loglog(x, y, style, color=color, marker="o", label=f"{what}, {width}")
        for line in of_width:
            if line["what"].startswith("a pass"):
                axis.axhline(float(line["seconds"]), linestyle=style, color="silver")
                where = (1, float(line["seconds"]))
                axis.annotate(f"{line['what']}, {width}, {line['features']} features", where, fontsize=7)
    axis.set(xlabel="forgotten classes of 1000", ylabel="seconds")
    axis.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    lines = read_cells(args.output / "streamed.csv")
    for width, features in SIZES.items():
        if str(width) not in {line["width"] for line in lines}:
            lines += measure(width, features, CLASSES, FORGOTTEN)
            write_rows(args.output / "streamed.csv", lines)
            lines = read_cells(args.output / "streamed.csv")
    write_figure(args.output / "streamed.png", draw(lines))
    write_table(args.output / "streamed", lines, below=f"{hardware(processes().device)}.")


if __name__ == "__main__":
    main()
