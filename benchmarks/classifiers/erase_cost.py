"""What `erase_classes` costs beyond a bare forward pass over the same data: time and memory. Writes erase_cost.csv and erase_cost.md.

    python benchmarks/classifiers/erase_cost.py

Forward pass and erasure take turns in one process, over the same loader with the same batches. The fastest of each counts: what other work
on the machine adds is never negative. On a CPU the time is that of the process (one thread), on CUDA the clock's.
"""

import argparse
import time
from pathlib import Path

import torch
from accelerate.utils import tqdm

import more_hf
from more_hf.classification.heads import evaluating
from more_hf.data import CLASSIFIERS, load_classifier
from more_hf.evaluation.kd_data import load_kd_data
from more_hf.evaluation.machine import hardware, peak_memory, processes
from more_hf.report import markdown_table, write_rows, write_text


HERE = Path(__file__).parent
FASHION = [name for name in CLASSIFIERS if name.startswith("fashion")]
COLUMNS = ("classifier", "images", "d", "seconds_forward", "seconds_erase", "overhead", "peak_extra_mib", "statistics_mib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifiers", nargs="+", choices=CLASSIFIERS, default=FASHION, metavar="NAME")
    parser.add_argument("--limit", type=int, default=60_000, help="training images at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, args) for name in args.classifiers]
    write_rows(args.output / "erase_cost.csv", rows)
    text = (
        "# What `erase_classes` costs beyond a forward pass\n\n"
        f"`overhead` in percent of the bare forward pass, the fastest of {args.repeats} each; `peak_extra_mib` is the growth of the "
        "process's peak memory during the erasure over that during the pass, "
        "`statistics_mib` what the prototypes, counts and second moment hold, "
        f"8 (dk + k + d²) bytes. On {rows[0]['hardware']}. Written by `erase_cost.py`.\n\n"
    )
    write_text(args.output / "erase_cost.md", text + markdown_table(rows, COLUMNS) + "\n")
    print(markdown_table(rows, COLUMNS))


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    device = processes().device
    model = load_classifier(name).to(device)
    data = load_kd_data(name.rpartition("-")[0]).train
    loader = data.subset(torch.arange(min(args.limit, len(data)))).loader(args.batch_size)
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def forward() -> None:
        with evaluating(model):
            for batch in loader:
                model(batch["pixel_values"].to(device))

    def erase() -> None:
        more_hf.erase_classes(model, loader, [0])

    def timed(work) -> tuple[float, float | None]:
        with peak_memory(device) as peak:
            start = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = clock() - start
        return seconds, peak.mebibytes

    forward()  # once for allocators and kernels to settle
    found = {forward: [], erase: []}
    for _ in tqdm(range(args.repeats), desc=name):
        found[forward].append(timed(forward))
        found[erase].append(timed(erase))
        more_hf.restore(model)
    seconds = {work: min(second for second, _ in runs) for work, runs in found.items()}
    peaks = {work: [peak for _, peak in runs if peak is not None] for work, runs in found.items()}
    d, k = model.get_submodule(head_of(model)).in_features, len(model.config.id2label)
    return {
        "classifier": name,
        "images": len(loader.dataset),
        "d": d,
        "seconds_forward": round(seconds[forward], 3),
        "seconds_erase": round(seconds[erase], 3),
        "overhead": round(100 * (seconds[erase] / seconds[forward] - 1), 2),
        "seconds_forward_each": " ".join(f"{second:.6f}" for second, _ in found[forward]),
        "seconds_erase_each": " ".join(f"{second:.6f}" for second, _ in found[erase]),
        "peak_extra_mib": round(max(peaks[erase]) - max(peaks[forward]), 1) if peaks[erase] else None,
        "statistics_mib": round(8 * (d * k + k + d * d) / 2**20, 3),
        "batch_size": args.batch_size,
        "hardware": hardware(device),
    }


def head_of(model) -> str:
    """Name of the last linear layer, which is these classifiers' head."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][-1]


if __name__ == "__main__":
    main()
