"""The cost of `erase_classes` beyond a bare forward pass over the same data: time and memory.

    python benchmarks/classifiers/erase_cost.py

Writes erase_cost.csv and erase_cost.md. The erasure, from the first batch to the proof by run, and a bare
forward pass of a copy of the model over the same images take turns batch by batch, each on its own clock, so
that a machine with other work slows both alike. The turns are repeated, and the fastest of each turn counts:
what other work adds is never negative. On a CPU the time is that of the process (one thread), on CUDA the
clock's. Memory is measured before, in passes of their own.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from accelerate.utils import tqdm
from torch import nn
from torch.utils.data import DataLoader

import more_hf
from more_hf.classification.heads import evaluating
from more_hf.data import CLASSIFIERS, load_classifier
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.machine import hardware, peak_memory, processes
from more_hf_bench.script import argument_parser, write_table
from more_hf_bench.splits import ImageSet


HERE = Path(__file__).parent
FASHION = [name for name in CLASSIFIERS if name.startswith("fashion")]
COLUMNS = (
    "classifier", "images", "d", "seconds_forward", "seconds_erase", "overhead", "overhead_each",
    "peak_extra_mib", "statistics_mib",
)  # fmt: skip
NOTE = """# What `erase_classes` costs beyond a forward pass

The erasure and a bare forward pass over the same images take turns batch by batch, and the fastest of \
{repeats} repeats of each turn counts. `overhead` in percent of the forward pass; `overhead_each` is that \
of every repeat as a whole. `peak_extra_mib` is the growth of the process's peak memory during an erasure \
over that during a pass, after a first erasure, `statistics_mib` what the prototypes, counts and second \
moment hold, 8 (dk + k + d²) bytes. On {hardware}. Written by `erase_cost.py`."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--classifiers", nargs="+", choices=CLASSIFIERS, default=FASHION, metavar="NAME")
    parser.add_argument("--limit", type=int, default=60_000, help="training images at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, args) for name in args.classifiers]
    note = NOTE.format(repeats=args.repeats, hardware=rows[0]["hardware"])
    write_table(args.output / "erase_cost", rows, COLUMNS, above=note)


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    device = processes().device
    model = load_classifier(name).to(device)
    images = load_kd_data(name.rpartition("-")[0]).train
    images = images.subset(torch.arange(min(args.limit, len(images))))
    loader = images.loader(args.batch_size)
    extra = peak_of_erasure(model, loader, device)
    runs = [take_turns(model, images, args.batch_size, device) for _ in tqdm(range(args.repeats), desc=name)]
    # Seconds of every turn in every repeat, (repeats, turns).
    forward_each = torch.tensor([forward for forward, _ in runs], dtype=torch.float64)
    erase_each = torch.tensor([erase for _, erase in runs], dtype=torch.float64)
    seconds_forward = float(forward_each.min(0).values.sum())
    seconds_erase = float(erase_each.min(0).values.sum())
    overheads = (100 * (erase_each.sum(1) / forward_each.sum(1) - 1)).tolist()
    d, k = model.get_submodule(head_of(model)).in_features, len(model.config.id2label)
    return {
        "classifier": name,
        "images": len(images),
        "d": d,
        "seconds_forward": round(seconds_forward, 3),
        "seconds_erase": round(seconds_erase, 3),
        "overhead": round(100 * (seconds_erase / seconds_forward - 1), 2),
        "overhead_each": " ".join(f"{overhead:.2f}" for overhead in overheads),
        "seconds_forward_each": " ".join(f"{seconds:.6f}" for seconds in forward_each.sum(1).tolist()),
        "seconds_erase_each": " ".join(f"{seconds:.6f}" for seconds in erase_each.sum(1).tolist()),
        "peak_extra_mib": extra,
        "statistics_mib": round(8 * (d * k + k + d * d) / 2**20, 3),
        "batch_size": args.batch_size,
        "hardware": hardware(device),
    }


def take_turns(
    model: nn.Module, images: ImageSet, batch_size: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each batch of a forward pass; seconds of an erasure before its first batch, with each, after
    the last."""
    loader, bare = images.loader(batch_size), copy.deepcopy(model)
    # The pass starts in the middle: neither finds in the cache what the other has just read.
    middle = len(loader) // 2 * batch_size
    plain = iter(images.subset(torch.arange(len(images)).roll(-middle)).loader(batch_size))
    forward, erase = [], []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def batches():
        """The erasure's batches. Before it gets one its clock is stopped, and the forward pass does one of
        its own."""
        nonlocal start
        own = iter(loader)
        for _ in range(len(loader)):
            erase.append(now() - start)
            start = now()
            bare(next(plain)["pixel_values"].to(device))
            forward.append(now() - start)
            start = now()
            yield next(own)

    with evaluating(bare):
        start = now()
        more_hf.erase_classes(model, batches(), [0])
        erase.append(now() - start)
    more_hf.restore(model)
    return forward, erase


def peak_of_erasure(model: nn.Module, loader: DataLoader, device: torch.device) -> float | None:
    """By how many mebibytes the peak memory of an erasure exceeds that of a forward pass; `None` where the
    system does not say."""

    def forward() -> None:
        with evaluating(model):
            for batch in loader:
                model(batch["pixel_values"].to(device))

    def erase() -> None:
        more_hf.erase_classes(model, loader, [0])
        more_hf.restore(model)

    erase()  # once, for what is loaded at first use and for allocators to settle
    with peak_memory(device) as plain:
        forward()
    with peak_memory(device) as erasing:
        erase()
    return None if plain.mebibytes is None else round(erasing.mebibytes - plain.mebibytes, 1)


def head_of(model) -> str:
    """Name of the last linear layer, which is these classifiers' head."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][-1]


if __name__ == "__main__":
    main()
