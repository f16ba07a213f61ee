"""What the proof by run catches, and what it refuses wrongly, on every family in every precision.

    python benchmarks/proof/controls.py                # controls.csv; a few minutes on a CPU
    OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/proof/controls.py --seeds 50 --name avx2

The denoisers are the tests' tiny ones, and prototypes are drawn at random: half of the edits have a cosine
above .998 between concept and target, and half have a router. One line for each family and precision:
`left_out`, the layers that are seen to read the prompt when they are left out of the edit; `old_weight`, the
layers that are seen when they compute with their weight from before it; `refused`, the correct edits that are
refused. `largest_error` is the largest error of a correct layer and `smallest_old` the smallest of a layer
with its old weight, in roundings of one layer; the limit is 4.
"""

import sys
from pathlib import Path

import pandas
import torch

from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from support.families import TINY  # noqa: E402
from support.proofs import (  # noqa: E402
    denoiser_in,
    erasure_by_chance,
    proof_of,
    sees_left_out,
    sees_old_weight,
)

import more_hf  # noqa: E402


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def measure(family: str, precision: str, seeds: int) -> dict:
    """One line of the table."""
    pipe, denoiser = denoiser_in(family, DTYPES[precision])
    erasure = erasure_by_chance(pipe, denoiser, seed=0)
    left_out = [sees_left_out(denoiser, erasure, name) for name in erasure.sites]
    old_weight = [sees_old_weight(denoiser, erasure, name) for name in erasure.sites]
    proofs, refused = [], 0
    for seed in range(seeds):
        router = "random" if seed % 4 >= 2 else None
        erasure = erasure_by_chance(pipe, denoiser, seed, close=seed % 2 == 1, router=router)
        try:
            proofs.append(proof_of(denoiser, erasure))
        except more_hf.SiteNotFoundError:
            refused += 1
    return {
        "family": family,
        "precision": precision,
        "layers": len(erasure.sites),
        "left_out": sum(left_out),
        "old_weight": sum(old_weight),
        "edits": seeds,
        "refused": refused,
        "largest_error": round(max(proof["layer_error"] for proof in proofs), 2),
        "smallest_old": round(min(proof["layer_changed"] for proof in proofs)),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=50, help="correct edits per family and precision (50)")
    parser.add_argument("--families", nargs="+", default=sorted(TINY), help="(all)")
    parser.add_argument("--name", default="controls", help="of the files that are written (controls)")
    args = parser.parse_args()
    lines = []
    for family in args.families:
        for precision in DTYPES:
            lines.append(measure(family, precision, args.seeds))
            print(lines[-1], flush=True)
    table = pandas.DataFrame(lines)
    table.to_csv(HERE / f"{args.name}.csv", index=False)


if __name__ == "__main__":
    main()
