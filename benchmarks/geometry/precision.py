"""How far an edit that was fitted with the text encoder in one precision is off where it runs in another.

    OMP_NUM_THREADS=1 python benchmarks/geometry/precision.py    # precision.csv, precision.md

Each artist of the embedded pipeline is erased to the next one. `left` is how much of the way from a forgotten
prototype to its target is left, in percent, as a root mean square over the positions of the name, with the
prototypes of the text encoder that runs: the mean over the artists, and the worst.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from optimum.quanto import freeze, qint4, qint8, quantize

import more_hf
from more_hf.core.remap import Remap
from more_hf.core.request import ConceptRequest
from more_hf.data import EMOJI_ARTISTS
from more_hf.diffusion.encoder import Encoder
from more_hf.diffusion.plan import solve
from more_hf_bench.machine import hardware, versions
from more_hf_bench.script import argument_parser, write_table


HERE = Path(__file__).parent
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = {"8 bits (quanto)": qint8, "4 bits (quanto)": qint4}
WHOLE = "float32"


def pipeline(precision: str) -> StableDiffusionPipeline:
    """The embedded pipeline with its text encoder in this precision."""
    pipe = more_hf.load_emoji_sd()
    if precision in QUANTIZED:
        quantize(pipe.text_encoder, weights=QUANTIZED[precision])
        freeze(pipe.text_encoder)
    pipe.text_encoder.to(HALF.get(precision, torch.float32))
    return pipe


def fit(precision: str, artists: list[str]) -> dict[str, Remap]:
    """The edit of each artist."""
    pipe, remaps = pipeline(precision), {}
    for artist, target in zip(artists, [*artists[1:], artists[0]], strict=True):
        request = ConceptRequest.of(artist, remap_to=target)
        remaps[artist] = solve(Encoder.of(pipe, request), request).remaps["tokens"]
    return remaps


def left(fitted: Remap, run: Remap) -> float:
    """How much of the way between the prototypes of `run` is left by the edit `fitted`, in percent."""
    P, forget, to = run.prototypes.matrix, list(run.forget), run.targets[0]
    moved = fitted.apply(P.T).T
    return 100 * float((moved[:, forget] - moved[:, to]).norm() / (P[:, forget] - P[:, to]).norm())


def measure(artists: list[str]) -> list[dict]:
    """One line for each precision: alone, and in place of the whole one."""
    edits = {precision: fit(precision, artists) for precision in (WHOLE, *HALF, *QUANTIZED)}
    lines = []
    for precision in edits:
        pairs = dict.fromkeys([(precision, precision), (WHOLE, precision), (precision, WHOLE)])
        for fitted, run in pairs:
            found = [left(edits[fitted][artist], edits[run][artist]) for artist in artists]
            line = {"fitted with": fitted, "run with": run}
            lines.append({**line, "left": sum(found) / len(found), "left at worst": max(found)})
    return [
        {name: round(cell, 3) if isinstance(cell, float) else cell for name, cell in line.items()}
        for line in lines
    ]


def main(parser: argparse.ArgumentParser) -> None:
    parser.parse_args()
    facts = f"{hardware(torch.device('cpu'))}; torch {versions()['torch']}"
    write_table(HERE / "precision", measure(list(EMOJI_ARTISTS)), below=facts)


if __name__ == "__main__":
    main(argument_parser(__doc__))
