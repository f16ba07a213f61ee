"""What a study costs beside one erasure and its pictures, in processor seconds of the same process.

    python benchmarks/tune/cost.py NAME ...    # by default an artist and a thing

The erasure sends the name to the study's target, with its proof; its pictures are the 36 prompts by which a
study measures an edit, by the original and after the erasure. Writes a line for each name to cost.csv;
processor seconds of all threads, so that what else a machine does counts little.
"""

import sys
from pathlib import Path
from time import process_time

from run import BATCH, SAMPLING, load

import more_hf
from more_hf.diffusion.draw import draw
from more_hf.tuning.search import original_cases
from more_hf_bench.columns import append_row, read_cells


FILE = Path(__file__).with_name("cost.csv")
MOST = 10  # times


def measure(name: str) -> dict:
    """The processor seconds of a study, and of one erasure with its pictures."""
    pipe = load()
    start = process_time()
    study = more_hf.tune(pipe, name, sampling=SAMPLING, batch_size=BATCH)
    tuned, setup = process_time() - start, study.setup
    cases = setup.cases(setup.pictures)

    def draw_all() -> None:
        for first in range(0, len(cases), BATCH):
            batch = cases[first : first + BATCH]
            draw(pipe, [case.prompt for case in batch], [case.seed for case in batch], setup.sampling)

    start = process_time()
    draw_all()
    study.erase(pipe)
    draw_all()
    erased = process_time() - start
    originals = sum(map(len, original_cases(setup).values()))
    line = {"name": name, "edit": study.choices[0].label, "pictures": len(study.judgments) + originals}
    line |= {"study_seconds": round(tuned, 1), "erasure_pictures": 2 * len(cases)}
    return {**line, "erasure_seconds": round(erased, 1), "times": round(tuned / erased, 2)}


def main() -> None:
    done = {line["name"] for line in read_cells(FILE)}
    for name in sys.argv[1:] or ("Noto", "turtle"):
        if name not in done:
            append_row(FILE, measure(name))
    worst = max(float(line["times"]) for line in read_cells(FILE))
    print(f"A study takes {worst:.1f} times one erasure and its pictures (at most {MOST}).")


if __name__ == "__main__":
    main()
