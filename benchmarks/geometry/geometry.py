"""Closed-form methods at 1 to 1000 concepts at once: time, memory, and what every other feature loses. On
synthetic features.

    OMP_NUM_THREADS=1 python benchmarks/geometry/geometry.py    # geometry.csv, geometry.md, geometry.png

The features are not a text encoder's. They are drawn around a mean with covariance eigenvalues proportional
to 1 / i, in 768 dimensions; a third of their mean square, which is 768, is the mean's. Every concept, its own
target, the retained names and ordinary text are independent draws. Four layers of 640 x 768 with Gaussian
weights read them. Each method gets one vector per name, as UCE does, and its published settings.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from more_hf.core.errors import PrototypeError
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf.diffusion.prompts import TEMPLATES
from more_hf_bench.columns import write_rows
from more_hf_bench.figures import write_figure
from more_hf_bench.machine import hardware, peak_memory
from more_hf_bench.methods.diffusion.closed_form import (
    adversarial_embeddings,
    cure_eraser,
    edit_matrix,
    erasing_term,
    null_space,
    refined_prior,
    rotation,
    speed_update,
)
from more_hf_bench.methods.diffusion.ours import without_orthogonalization


matplotlib.use("Agg")
HERE = Path(__file__).parent
WIDTH, OUT, LAYERS = 768, 640, 4
CONCEPTS = (1, 10, 100, 300, 1000)
RETAINED, ORDINARY = 100, 2000
MEAN_SHARE = 1 / 3


def features(count: int, generator: torch.Generator, basis: Tensor) -> Tensor:
    """
    `(count, WIDTH)`, float64: draws with the declared spectrum. `basis` is orthonormal, and its last column
    the mean's direction.
    """
    spectrum = 1 / torch.arange(1, WIDTH + 1, dtype=torch.float64)
    spectrum *= (1 - MEAN_SHARE) * WIDTH / spectrum.sum()
    drawn = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) * spectrum.sqrt()
    return drawn @ basis.T + (MEAN_SHARE * WIDTH) ** 0.5 * basis[:, -1]


class Problem:
    """
    Concepts C, targets G `(n, d)`, retained names R, a second moment of ordinary text, and ordinary text that
    no method saw.
    """

    def __init__(self, concepts: int):
        generator = torch.Generator().manual_seed(concepts)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q
        self.C, self.G = features(concepts, generator, basis), features(concepts, generator, basis)
        self.R, seen = features(RETAINED, generator, basis), features(ORDINARY, generator, basis)
        self.unseen = features(ORDINARY, generator, basis)
        self.moment = seen.T @ seen / ORDINARY
        self.layers = [
            torch.randn(OUT, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
            for _ in range(LAYERS)
        ]

    def prototypes(self, *parts: Tensor) -> Prototypes:
        """The rows of parts `(n, d)` as prototypes c0, c1, ..., g0, ..., r0, ..."""
        names = tuple(
            f"{kind}{i}" for kind, part in zip("cgr", parts, strict=False) for i in range(len(part))
        )
        return Prototypes(
            torch.cat(parts).T, names, torch.ones(len(names), dtype=torch.int64), self.moment, ORDINARY
        )

    def names(self, kind: str) -> list[str]:
        return [f"{kind}{i}" for i in range(len(self.C))]

    def remapped(self, prototypes: Prototypes, targets: Sequence | None = None, **options) -> list[Tensor]:
        """Every layer with every concept sent to its own target, or to what else is given."""
        remap = Remap.fit(prototypes, self.names("c"), [targets or self.names("g")], **options)
        return [remap.merged(W) for W in self.layers]


def more(problem: Problem) -> list[Tensor]:
    return problem.remapped(problem.prototypes(problem.C, problem.G), solver="covariance")


def more_soft(problem: Problem) -> list[Tensor]:
    prototypes = problem.prototypes(problem.C, problem.G)
    # A retained name's prompts are among the ordinary ones, one for each template.
    retained = len(TEMPLATES) * problem.R.T @ problem.R
    count = ORDINARY + len(TEMPLATES) * RETAINED
    prototypes = replace(prototypes, second_moment=(ORDINARY * problem.moment + retained) / count)
    return problem.remapped(prototypes, solver="soft")


def more_pinv(problem: Problem) -> list[Tensor]:
    return problem.remapped(problem.prototypes(problem.C, problem.G, problem.R))


def more_erase(problem: Problem) -> list[Tensor]:
    nowhere = [None] * len(problem.C)
    return problem.remapped(problem.prototypes(problem.C), nowhere, solver="covariance")


def more_without_po(problem: Problem) -> list[Tensor]:
    remap = without_orthogonalization(
        problem.prototypes(problem.C, problem.G), problem.names("c"), [problem.names("g")]
    )
    return [remap.merged(W) for W in problem.layers]


def run_uce(problem: Problem) -> list[Tensor]:
    A = edit_matrix(problem.C, problem.G, problem.R, lamb=0.5, erase_scale=1.0, preserve_scale=1.0)
    return [W @ A for W in problem.layers]


def run_rece(problem: Problem) -> list[Tensor]:
    scales = {"erase_scale": 1.0, "preserve_scale": 0.1}
    A = edit_matrix(problem.C, problem.G, problem.R, lamb=0.5, **scales)
    adversarial = adversarial_embeddings(sum(W.T @ W for W in problem.layers), A, problem.C, 1e-3)
    A = A @ edit_matrix(adversarial, problem.G, problem.R, lamb=0.1, **scales)
    return [W @ A for W in problem.layers]


def run_cure(problem: Problem) -> list[Tensor]:
    A = cure_eraser(problem.C, problem.R, 2.0)
    return [W @ A for W in problem.layers]


def run_speed(problem: Problem) -> list[Tensor]:
    n, generator, edited = len(problem.C), torch.Generator().manual_seed(0), []
    A, B = problem.C.T @ problem.C / n, problem.G.T @ problem.C / n
    threshold = 1e-1 if n <= 10 else 1e-4  # as published for few and for many concepts
    invariant = problem.unseen.new_zeros(WIDTH, 0)  # the begin token and the padding have no counterpart here
    for W in problem.layers:
        prior = refined_prior(W, A, B, problem.R, 10, generator)
        edited.append(W + W @ speed_update(A, B, null_space(prior, threshold), invariant, 1.0, 0.0))
    return edited


def run_oce(problem: Problem) -> list[Tensor]:
    # As published for styles, and for 100 celebrities.
    erase, spread = (500.0, 10.0) if len(problem.C) < 100 else (800.0, 70.0)
    kept = problem.R.T @ problem.R + spread * problem.moment + 10.0 * torch.eye(WIDTH, dtype=torch.float64)
    return [
        rotation(erasing_term(W, problem.C, problem.G, erase) + W @ kept @ W.T) @ W for W in problem.layers
    ]


METHODS: dict[str, Callable[[Problem], list[Tensor]]] = {
    "more": more,
    "more (soft)": more_soft,
    "more (pinv)": more_pinv,
    "more-erase": more_erase,
    "more-without-po": more_without_po,
    "uce": run_uce,
    "rece": run_rece,
    "cure": run_cure,
    "speed": run_speed,
    "oce": run_oce,
}
WITHOUT_TARGET = ("more-erase", "cure")
NUMBERS = ("concept_moved", "concept_to_target", "retained_moved", "ordinary_moved", "seconds", "memory")


def moved(problem: Problem, edited: list[Tensor], x: Tensor, reference: Tensor | None = None) -> float:
    """
    How far W' x is from W x, in percent: root mean square over features `(n, d)` and layers. With a
    reference, how far it is from W times that; W x is 100 % away from it.
    """
    change = total = 0.0
    for W, new in zip(problem.layers, edited, strict=True):
        wanted = (x if reference is None else reference) @ W.T
        change += float((x @ new.T - wanted).square().sum())
        total += float(((x @ W.T) if reference is None else (x @ W.T - wanted)).square().sum())
    return 100 * (change / total) ** 0.5


def measure(method: str, problem: Problem) -> dict:
    line = {"method": method, "concepts": len(problem.C)}
    has_target = method not in WITHOUT_TARGET
    # Memory that earlier methods freed goes back to the system; reused, it would not be counted.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with peak_memory(torch.device("cpu")) as before:
        pass  # what is resident now
    start = time.process_time()  # of one thread, so that what else runs on the machine does not count
    try:
        with peak_memory(torch.device("cpu")) as peak:
            edited = METHODS[method](problem)
    except PrototypeError as error:
        return {**line, **dict.fromkeys(NUMBERS), "note": str(error)}
    seconds = time.process_time() - start
    return {
        **line,
        "concept_moved": round(moved(problem, edited, problem.C), 3),
        "concept_to_target": round(moved(problem, edited, problem.C, problem.G), 3) if has_target else None,
        "retained_moved": round(moved(problem, edited, problem.R), 3),
        "ordinary_moved": round(moved(problem, edited, problem.unseen), 3),
        "seconds": round(seconds, 4),
        "memory": round(peak.mebibytes - before.mebibytes, 1),
        "note": "",
    }


def plot(lines: list[dict]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    shown = {
        "concept_to_target": "concepts: distance to their targets, %",
        "retained_moved": "retained names: moved by, %",
        "ordinary_moved": "ordinary text: moved by, %",
    }
    for ax, (column, title) in zip(axes, shown.items(), strict=True):
        for method in METHODS:
            own = [line for line in lines if line["method"] == method and line[column] is not None]
            ax.plot(
                [line["concepts"] for line in own],
                [max(line[column], 1e-2) for line in own],
                marker="o",
                label=method,
            )
        ax.set(xscale="log", yscale="log", xlabel="concepts erased together", title=title)
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    write_figure(HERE / "geometry.png", figure)


def main() -> None:
    for method in METHODS:
        METHODS[method](Problem(2))  # the first call of each pays for loading kernels
    lines = []
    for concepts in CONCEPTS:
        problem = Problem(concepts)
        lines += [measure(method, problem) for method in METHODS]
    write_rows(HERE / "geometry.csv", lines)
    notes = [
        f"- {line['method']}, {line['concepts']} concepts: {line['note']}" for line in lines if line["note"]
    ]
    table = markdown_table([{**line, "note": "refused" if line["note"] else ""} for line in lines])
    write_text(
        HERE / "geometry.md", "\n\n".join([table, "\n".join(notes), hardware(torch.device("cpu"))]) + "\n"
    )
    plot(lines)
    print(table)


if __name__ == "__main__":
    main()
