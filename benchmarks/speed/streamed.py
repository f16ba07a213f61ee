"""Forget 1, 10 and 100 of a thousand classes, on features that are streamed: ours, ESC's and UCE's solves.

    OMP_NUM_THREADS=1 python benchmarks/speed/streamed.py    # streamed.csv, .md and .png; an hour

1.15 million features of 768 and of 4,096 numbers, made batch by batch and never kept. Making them is not
counted. `esc` reads the features of the forgotten classes, `uce` the means, as we do. Seconds are of the
processor. A part whose line is in the CSV file is not measured again, and a pass goes on where it was killed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from many_classes import BATCH, HERE, SAMPLES, Classifier
from matplotlib.figure import Figure
from torch import Tensor

import more_hf
from more_hf.core.files import replacing
from more_hf.core.prototypes import PrototypeFitter, Prototypes, Totals
from more_hf_bench.columns import read_cells, write_rows
from more_hf_bench.figures import write_figure
from more_hf_bench.machine import hardware, peak_memory, processes
from more_hf_bench.methods.diffusion.closed_form import edit_matrix
from more_hf_bench.script import argument_parser, write_table


CLASSES, FORGOTTEN, WIDTHS = 1000, (1, 10, 100), (768, 4096)
SOLVES = {"ours": "tab:blue", "esc": "tab:orange", "uce": "tab:green"}
Part = Callable[[], tuple[object, float]]  # its result, and the seconds that it took


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds.append(time.process_time() - start)


def stream(labels: Tensor, means: Tensor, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Features around the means of their classes, with a spectrum that falls as 1/i, and labels; from a
    batch on.
    """
    spectrum = torch.arange(1, means.shape[1] + 1).rsqrt()
    for batch, own in enumerate(labels.split(BATCH)[first:], first):
        generator = torch.Generator().manual_seed(batch)
        noise = torch.randn(len(own), means.shape[1], generator=generator)
        yield means[own] + noise * spectrum, own


def run_pass(labels: Tensor, means: Tensor, file: Path, second_moment: bool) -> tuple[Prototypes, float]:
    """Sum the features up, from where the file ends; the file stays."""
    fitter = PrototypeFitter(means.shape[1], [str(c) for c in range(len(means))])
    saved = torch.load(file) if file.exists() else {"batches": 0, "seconds": 0.0}
    if saved["batches"]:
        fitter.totals = Totals(**saved["totals"])
    for z, y in stream(labels, means, saved["batches"]):
        seconds = [saved["seconds"]]
        with timed(seconds):
            fitter.update(z, y)
            if second_moment:
                fitter.update_moment(z)
        totals = fitter.totals._asdict()
        saved = {"batches": saved["batches"] + 1, "seconds": sum(seconds), "totals": totals}
        with replacing(file) as draft:
            torch.save(saved, draft)
    return fitter.prototypes, saved["seconds"]


def run_ours(prototypes: Prototypes, forgotten: int) -> tuple[Classifier, float]:
    width, classes = prototypes.matrix.shape
    model, seconds = Classifier(width, classes).eval(), []
    with timed(seconds):
        more_hf.erase_classes(model, prototypes, list(range(forgotten)), head="head", most_lost=100)
    return model, sum(seconds)


def run_esc(labels: Tensor, means: Tensor, forgotten: int) -> tuple[Tensor, float]:
    total = torch.zeros(means.shape[1], means.shape[1], dtype=torch.float64)
    seconds: list[float] = []
    for z, _ in stream(labels[labels < forgotten], means):
        with timed(seconds):
            total += z.double().T @ z.double()
    with timed(seconds):
        directions = torch.linalg.eigh(total).eigenvectors
    return directions, sum(seconds)


def run_uce(prototypes: Prototypes, forgotten: int) -> tuple[Tensor, float]:
    weight, seconds = Classifier(*prototypes.matrix.shape).head.weight.detach(), []
    with timed(seconds):
        P = prototypes.matrix.T
        targets = P[forgotten:].mean(0).expand(forgotten, -1)
        A = edit_matrix(P[:forgotten], targets, P[forgotten:], erase_scale=1.0, preserve_scale=0.1, lamb=0.5)
        edited = (weight.double() @ A).float()
    return edited, sum(seconds)


def measure(
    width: int, features: int, classes: int, forgets: tuple[int, ...], done: Sequence[dict], folder: Path
) -> Iterator[dict]:
    """A line for each part that is not done; the folder holds the sums of the passes meanwhile."""
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(1)) + 1
    labels = torch.arange(features) % classes
    measured = {(line["what"], str(line["width"]), str(line["forgotten"])) for line in done}
    files = [folder / f"streamed-{width}{name}.pt" for name in ("", "-moment")]
    passes = [partial(run_pass, labels, means, file, moment) for moment, file in enumerate(files)]

    def parts() -> Iterator[tuple[str, int | str, Part]]:
        yield "a pass, means", "", passes[0]
        yield "a pass, means and Σ", "", passes[1]
        prototypes, _ = passes[1]()  # which has ended, and is read
        for forgotten in forgets:
            yield "ours", forgotten, partial(run_ours, prototypes, forgotten)
            yield "esc", forgotten, partial(run_esc, labels, means, forgotten)
            yield "uce", forgotten, partial(run_uce, prototypes, forgotten)

    if len([key for key in measured if key[1] == str(width)]) == 2 + 3 * len(forgets):
        return
    for what, forgotten, part in parts():
        if (what, str(width), str(forgotten)) in measured:
            continue
        with peak_memory(torch.device("cpu")) as peak:
            seconds = part()[1]
        line = {"what": what, "width": width, "features": features, "forgotten": forgotten}
        yield {**line, "seconds": round(seconds, 3), "MiB at most": round(peak.mebibytes or 0)}
    for file in files:
        file.unlink(missing_ok=True)


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
                what = f"{line['what']}, {width}, {line['features']} features"
                axis.annotate(what, (1, float(line["seconds"])), fontsize=7, va="bottom")
    axis.set(xlabel="forgotten classes of 1000", ylabel="seconds")
    axis.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    table = args.output / "streamed.csv"
    for width in WIDTHS:
        for line in measure(width, SAMPLES, CLASSES, FORGOTTEN, read_cells(table), args.output):
            print(line, flush=True)
            write_rows(table, [*read_cells(table), line])
    lines = read_cells(table)
    write_figure(args.output / "streamed.png", draw(lines))
    write_table(args.output / "streamed", lines, below=f"{hardware(processes().device)}.")


if __name__ == "__main__":
    main()
