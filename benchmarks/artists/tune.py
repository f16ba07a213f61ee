"""Tune every baseline for the embedded pipeline on the validation prompts.

Each has a small declared grid; the score is that of `choose.py`.

    python benchmarks/artists/tune.py                      # everything
    python benchmarks/artists/tune.py --methods uce rece   # a part

Every cell is a line of tuning.csv, and one that is there is not measured again. `settings.json` gets the best
cell of each method, for `tuned` in a file of `more-hf bench artists --config`. Every method is given the same
target and the same names to keep as in the benchmark. Ours is listed with its defaults, which `choose.py`
chose on the same prompts. The test prompts are not touched.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

from choose import HERE, PROMPTS, STYLES, THINGS, erasure_of, measure

from more_hf.core.files import write_json
from more_hf_bench.artists.prompts import read_prompts, read_targets
from more_hf_bench.methods.registry import DIFFUSION
from more_hf_bench.script import Point, argument_parser, best_settings, grid, points_of, search


CONTENT = [f"a {thing}" for thing in THINGS]  # short enough that an artist's name fits behind it
GRIDS = {
    "more": [{}],
    "uce": grid(lamb=[0.5, 5.0, 20.0, 100.0]),
    "rece": grid(lamb=[10.0, 50.0], start_lamb=[10.0, 50.0, 200.0]),
    "cure": grid(alpha=[2.0, 20.0], tokens=["content", "padded"]),
    "speed": grid(threshold=[1e-1, 1e-2, 1e-4], layers=["v", "kv"]),
    "oce": grid(global_scale=[1.0, 10.0, 100.0], layers=["v", "kv"]),
    "midsteer": grid(strength=[1.0, 2.0, 4.0]),
    "sld-medium": grid(warmup=[25, 10, 0], threshold=[0.01, 1.0]),
    "safree": grid(midpoint=[5.5, 1.0, -2.0], negative=[True, False]),
    "esd": grid(sampling_steps=10, iterations=[60, 120, 240], learning_rate=[2e-4, 5e-4, 1e-3, 2e-3]),
    "tea": grid(learning_rate=[1e-4, 3e-4, 1e-3], epochs=[2, 6]),
    "ca": grid(
        images=64,
        prompts=[CONTENT],
        sampling_steps=10,
        iterations=100,
        learning_rate=[2.5e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3],
    ),
}
# each is a training, or draws pictures of its own; the others run on all four
STYLES_OF = dict.fromkeys(("esd", "ca", "tea", "midsteer"), STYLES[:2])


def measure_methods(points: Sequence[Point]) -> Iterator[dict]:
    """Erase styles in turn, with the targets and the names to keep of the benchmark."""
    prompts = read_prompts(PROMPTS)
    targets, several = read_targets("targets"), read_targets("targets_several")
    for styles, own in groupby(points, lambda point: STYLES_OF.get(point["method"], STYLES)):
        functions = {}
        for point in own:
            method, settings = point["method"], point["settings"]
            functions[f"{method} {json.dumps(settings)}"] = partial(DIFFUSION[method].load(), **settings)
        erasures = {}
        for artist in styles:
            names = {"remap_to": targets[artist], "several": several[artist]}
            erasures[artist] = erasure_of(artist, 1, **names, retain=prompts.group_of(artist))
        yield from measure(functions, erasures, "methods")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=list(GRIDS), help="only these")
    args = parser.parse_args()
    points = [point for point in points_of(GRIDS) if point["method"] in args.methods]
    best = best_settings(search(HERE / "tuning.csv", points, measure_methods), GRIDS, "score")
    write_json(HERE / "settings.json", best)
    for method, settings in best.items():
        print(method, json.dumps(settings))


if __name__ == "__main__":
    main()
