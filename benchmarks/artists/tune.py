"""Tune every baseline for the embedded pipeline on the validation prompts.

Each has a small declared grid; the score is that of `choose.py`.

    python benchmarks/artists/tune.py                      # everything, one cell after the other python
    benchmarks/artists/tune.py --methods uce rece   # a part; several processes may each do some methods

Every cell is a line of tuning.csv, and one that is there is not measured again. `settings.json` gets the best
cell of each method, for `tuned` in a file of `more-hf bench artists --config`. Every method is given the same
target and the same names to keep as in the benchmark. Ours is listed with its defaults, which `choose.py`
chose on the same prompts. The test prompts are not touched.
"""

import argparse
import copy
import itertools
import json
import time
from dataclasses import asdict

from choose import HERE, STYLES, THINGS, Bench, Measurements

from more_hf.core.files import write_json
from more_hf_bench.artists.config import Erasure
from more_hf_bench.artists.prompts import read_prompts, read_targets
from more_hf_bench.columns import append_row, read_cells
from more_hf_bench.methods.registry import DIFFUSION


def grid(**values) -> list[dict]:
    """Every combination of the values; one that is not a list is the same in all."""
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*lists)]


CONTENT = [f"a {thing}" for thing in THINGS]  # short enough that an artist's name fits behind it
GRIDS = {
    "more": [{}],
    "uce": grid(lamb=[0.5, 5.0, 20.0, 100.0]),
    "rece": grid(lamb=[10.0, 50.0], start_lamb=[10.0, 50.0, 200.0]),
    "cure": grid(alpha=[2.0, 20.0], tokens=["content", "padded"]),
    "speed": grid(threshold=[1e-1, 1e-2, 1e-4], layers=["v", "kv"]),
    "oce": grid(global_scale=[1.0, 10.0, 100.0], layers=["v", "kv"]),
    "sld-medium": grid(warmup=[25, 10, 0], threshold=[0.01, 1.0]),
    "safree": grid(midpoint=[5.5, 1.0, -2.0], negative=[True, False]),
    "esd": grid(sampling_steps=10, iterations=[60, 120, 240], learning_rate=[2e-4, 5e-4, 1e-3, 2e-3]),
    "ca": grid(
        images=64,
        prompts=[CONTENT],
        sampling_steps=10,
        iterations=100,
        learning_rate=[2.5e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3],
    ),
}
STYLES_OF = {"esd": STYLES[:2], "ca": STYLES[:2]}  # each is a training; the others run on all four


class Tuning:
    """The validation bench, and the names that every method is given."""

    def __init__(self):
        self.bench = Bench()
        prompts = read_prompts("emoji10_validation")
        targets, several = read_targets("targets"), read_targets("targets_several")
        self.erasures = {
            artist: Erasure(targets[artist], several[artist], prompts.group_of(artist)) for artist in STYLES
        }

    def measure(self, method: str, settings: dict) -> dict:
        """One line: a method with its settings, over the styles erased in turn."""
        measurements = Measurements()
        styles, seconds = STYLES_OF.get(method, STYLES), 0.0
        for forget in styles:
            pipe = copy.copy(self.bench.pipe)
            pipe.register_modules(unet=copy.deepcopy(pipe.unet))
            arguments = asdict(self.erasures[forget].arguments(method, forget))
            start = time.perf_counter()
            pipe = DIFFUSION[method].load()(pipe, [forget], **arguments, **settings)
            seconds += (time.perf_counter() - start) / len(styles)
            self.bench.measure(forget, 1, measurements, pipe)
        return {
            "method": method,
            "settings": json.dumps(settings),
            **measurements.summary(),
            "seconds_prepare": round(seconds, 2),
        }


def best_settings(lines: list[dict[str, str]]) -> dict[str, dict]:
    """The settings with the best score, of every method whose grid is done and has more than one cell."""
    best = {}
    for method, cells in GRIDS.items():
        measured = [
            line for line in lines if line["method"] == method and json.loads(line["settings"]) in cells
        ]
        if len(measured) == len(cells) > 1:
            best[method] = json.loads(max(measured, key=lambda line: float(line["score"]))["settings"])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=list(GRIDS), help="only these")
    args = parser.parse_args()
    path, tuning = HERE / "tuning.csv", None
    for method in args.methods:
        for settings in GRIDS[method]:
            # Read again each time: several processes may append to the file.
            measured = [(line["method"], line["settings"]) for line in read_cells(path)]
            if (method, json.dumps(settings)) not in measured:
                tuning = tuning or Tuning()
                append_row(path, tuning.measure(method, settings))
    best = best_settings(read_cells(path))
    write_json(HERE / "settings.json", best)
    for method, settings in best.items():
        print(method, json.dumps(settings))


if __name__ == "__main__":
    main()
