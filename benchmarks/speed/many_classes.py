"""The parts of the ImageNet preset at full size, on synthetic features, and how they grow with the classes.

    OMP_NUM_THREADS=1 python benchmarks/speed/many_classes.py    # many_classes.csv, .md, .png; about an hour

1.15 million features of ViT-B/16's 768 numbers lie in a file that is mapped into memory, as `bench kd` keeps
them. A tenth of the classes is forgotten, with an expert for each that remains. Inverting two answers takes
the same for every pair: it is timed for `PAIRS` of them and multiplied. Seconds are of the processor, so that
what else a machine does is not in them.
"""

import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import more_hf
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.core.prototypes import PrototypeFitter
from more_hf_bench.classes.features import Cached, explain_two_answers, mapped
from more_hf_bench.classes.probes import converged_probe
from more_hf_bench.columns import write_rows
from more_hf_bench.figures import write_figure
from more_hf_bench.machine import hardware, peak_memory, processes
from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
SAMPLES, WIDTH, CLASSES = 1_150_000, 768, (10, 100, 1000)
PAIRS, BATCH = 2_000, 10_000
PARTS = (
    "prototypes and Σ",
    "erase",
    "one answer for each image",
    "two answers inverted",
    "a step of the new head",
)


class Classifier(nn.Module):
    """A head alone, whose images are features."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(pixel_values)


def write_features(path: Path, samples: int, width: int, classes: int) -> Tensor:
    """Features around the means of their classes, with a spectrum that falls as 1/i; write and map them."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, width, generator=generator) + 1
    spectrum = torch.arange(1, width + 1).rsqrt()
    file = np.lib.format.open_memmap(path, "w+", np.float32, (samples, width))
    for start in range(0, samples, BATCH):
        rows = torch.arange(start, min(start + BATCH, samples))
        noise = torch.randn(len(rows), width, generator=generator) * spectrum
        file[start : start + BATCH] = (means[rows % classes] + noise).numpy()
    del file
    return mapped(path)


def measure(samples: int, width: int, classes: int, pairs: int) -> list[dict]:
    """A line for each part."""
    lines = []

    @contextmanager
    def timed(times: float = 1.0) -> Iterator[None]:
        with peak_memory(torch.device("cpu")) as peak:
            start = time.process_time()
            yield
            seconds = time.process_time() - start
        part = PARTS[len(lines)]
        facts = {"part": part, "classes": classes, "features": samples, "width": width}
        lines.append(
            {**facts, "seconds": round(seconds * times, 2), "MiB at most": round(peak.mebibytes or 0)}
        )
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        z = write_features(Path(folder) / "features.npy", samples, width, classes)
        labels = torch.arange(samples) % classes
        model, forget = Classifier(width, classes).eval(), list(range(classes // 10))
        with timed():
            fitter = PrototypeFitter(width, [str(c) for c in range(classes)])
            for part, y in zip(z.split(BATCH), labels.split(BATCH), strict=True):
                fitter.update(part, y).update_moment(part)
            prototypes = fitter.prototypes
        with timed():
            settings = {"num_experts": classes - len(forget), "router": "random", "most_lost": 100}
            more_hf.erase_classes(model, prototypes, forget, head="head", **settings)
        cached = Cached({"train": z}, model, model.head)
        with timed():
            first = cached.features("train")
        some = slice(0, min(pairs, samples))
        asked = Cached({"train": z[some]}, model, model.head)
        answers = [asked.features("train", draw=draw) for draw in (0, 1)]
        experts = [asked.experts("train", draw=draw) for draw in (0, 1)]
        with timed(samples / len(answers[0])):
            for one in zip(*(part.split(100) for part in (*answers, *experts)), strict=True):
                explain_two_answers(cached.routed.remap, *one)
        with timed():
            one_step(first, labels)
    return lines


def one_step(features: Tensor, labels: Tensor) -> None:
    """The converged probe, for one iteration: whitening, loss and gradient."""
    with unittest.mock.patch("more_hf_bench.classes.probes.ITERATIONS", 1):
        converged_probe(features, labels)


def draw(lines: list[dict]) -> Figure:
    """Seconds over the number of classes, a curve for each part."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for part in PARTS:
        own = [line for line in lines if line["part"] == part]
        axis.loglog(
            [line["classes"] for line in own], [line["seconds"] for line in own], marker="o", label=part
        )
    axis.set(xlabel="classes", ylabel="seconds")
    axis.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    lines = []
    for classes in args.classes:
        lines += measure(args.samples, WIDTH, classes, PAIRS)
        write_rows(args.output / "many_classes.csv", lines)
    write_figure(args.output / "many_classes.png", draw(lines))
    largest = [line for line in lines if line["classes"] == args.classes[-1]]
    table = markdown_table(largest, ["part", "seconds", "MiB at most"])
    machine = hardware(processes().device)
    facts = f"{args.samples} features of {WIDTH} numbers, {args.classes[-1]} classes; {machine}."
    write_text(args.output / "many_classes.md", f"{table}\n\n{facts}\n")
    print(table)


if __name__ == "__main__":
    main()
