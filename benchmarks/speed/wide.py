"""Solving in the metric Σ of wide features: dense, and thin where the features are fewer than their width.

    python benchmarks/speed/wide.py    # wide.csv, wide.md

Each line is a process of its own: it fits `covariance` for one name of four prototypes, on random features,
and verifies it. Memory is how far the process's peak rises, the features or their Σ included. FLUX.2 [dev]
reads 15,360 numbers at a position, and everyday prompts have about 4,200 positions; the dense Σ of this width
was not solved.
"""

import multiprocessing
import resource
import time
from pathlib import Path

import torch

from more_hf.core.moment import Moment
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf_bench.machine import hardware, versions
from more_hf_bench.script import argument_parser, write_table


HERE = Path(__file__).parent
# width, features, whether dense as well
CASES = ((1024, 512, True), (4096, 1024, True), (15360, 4200, False))
NAMES = tuple(f"p{i}" for i in range(10))
FORGET, TARGETS = NAMES[:4], [NAMES[4:8]]
PEAK_UNIT = 1024  # bytes of `ru_maxrss` on Linux


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT / 2**20


def solve(width: int, features: int, thin: bool) -> tuple[float, float, torch.Tensor]:
    """The seconds, the rise of the peak in MiB, and D_F of one fit and its check."""
    generator = torch.Generator().manual_seed(0)
    P = torch.randn(width, len(NAMES), generator=generator, dtype=torch.float64)
    before = peak()
    z = torch.randn(features, width, generator=generator, dtype=torch.float64).div_(features**0.5)
    start = time.perf_counter()
    moment = Moment(z if thin else z.T @ z, features)
    del z
    prototypes = Prototypes(P, NAMES, torch.ones(len(NAMES), dtype=torch.int64)).with_moment(moment)
    remap = Remap.fit(prototypes, FORGET, TARGETS, solver="covariance")
    remap.verify()
    return time.perf_counter() - start, peak() - before, remap.D_F


def measure(cases=CASES) -> list[dict]:
    """One line per case and form of Σ."""
    lines = []
    for width, features, dense_too in cases:
        thin = alone(width, features, True)
        lines.append(line(width, features, "thin", thin))
        if dense_too:
            dense = alone(width, features, False)
            apart = float((dense[2] - thin[2]).norm() / thin[2].norm())
            ratios = round(dense[0] / thin[0], 1), round(dense[1] / max(thin[1], 1.0), 1)
            lines.append(line(width, features, "dense", dense, *ratios, f"{apart:.0e}"))
    return lines


def alone(*case: int) -> tuple[float, float, torch.Tensor]:
    """`solve` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(solve, case)


def line(width: int, features: int, form: str, found: tuple, time="", memory="", apart="") -> dict:
    return {
        "width": width,
        "features": features,
        "Σ": form,
        "seconds": round(found[0], 2),
        "MiB": round(found[1]),
        "times the thin one's seconds": time,
        "times its MiB": memory,
        "D_F apart": apart,
    }


def main() -> None:
    argument_parser(__doc__).parse_args()
    facts = f"{hardware(torch.device('cpu'))}; torch {versions()['torch']}"
    write_table(HERE / "wide", measure(), below=facts)


if __name__ == "__main__":
    main()
