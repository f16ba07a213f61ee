"""How much faster the batched probes are than one probe after another through the data loader, with the same
numbers.

    python benchmarks/kd/probes.py --dataset digits
    python benchmarks/kd/probes.py --dataset fashion-mnist --one_by_one 1

Both sides train the same heads: 3 learning rates and 5 seeds, 10 epochs, batch 64, from the same start in the
same order. One side reads every image through the classifier for every probe and epoch, the other caches the
features first, which is part of its time. With `--one_by_one N` only the first N probes are trained one by
one, and the others are taken to need as long each. A row per run goes to `probes.csv`.
"""

import itertools
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from more_hf.classification.heads import evaluating
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.features import cache, inputs_of
from more_hf_bench.classes.models import build_classifier
from more_hf_bench.classes.probes import LEARNING_RATES, new_heads, sgd_probes
from more_hf_bench.columns import read_cells, write_rows
from more_hf_bench.machine import hardware
from more_hf_bench.script import argument_parser
from more_hf_bench.splits import ImageSet


SEEDS, EPOCHS, BATCH = (0, 1, 2, 3, 4), 10, 64
CSV = Path(__file__).parent / "probes.csv"


def through_the_loader(
    model: nn.Module, images: ImageSet, num_classes: int, rate: float, seed: int
) -> nn.Linear:
    """Train one probe as one would write it: the classifier with a new head, frozen but for the head, images
    from a data loader."""
    old = model.classifier
    weight, shuffle = new_heads(old.in_features, num_classes, seed)
    head = nn.Linear(old.in_features, num_classes)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr=rate)
    with inputs_of(old) as seen:
        for _ in range(EPOCHS):
            order = torch.randperm(len(images), generator=shuffle).tolist()
            batches = BatchSampler(order, BATCH, drop_last=False)
            for batch in DataLoader(images, batch_size=None, sampler=batches):
                seen.clear()
                with evaluating(model):
                    model(batch["pixel_values"])
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(seen[0]), batch["labels"]).backward()
                optimizer.step()
    return head


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="allcnn-narrow")
    parser.add_argument("--one_by_one", type=int, default=len(LEARNING_RATES) * len(SEEDS), metavar="N")
    args = parser.parse_args()

    data = load_kd_data(args.dataset)
    model, k = build_classifier(args.model, data).eval(), len(data.class_names)
    start = time.perf_counter()
    features = cache(model, model.classifier, {"train": data.train}).features("train")
    caching = time.perf_counter() - start
    probes = sgd_probes(features, data.train.labels, k, seeds=SEEDS, epochs=EPOCHS, batch_size=BATCH)
    batched = time.perf_counter() - start

    start, worst, hits = time.perf_counter(), 0.0, 0
    for rate, seed in itertools.islice(itertools.product(LEARNING_RATES, SEEDS), args.one_by_one):
        head = through_the_loader(model, data.train, k, rate, seed)
        probe = probes[rate, seed]
        difference = (head.weight - probe.weight).abs().max() / head.weight.abs().max()
        worst = max(worst, difference.item())
        with torch.no_grad():
            hits = max(hits, int((head(features).argmax(1) != probe(features).argmax(1)).sum()))
    single = (time.perf_counter() - start) / args.one_by_one * len(probes)
    row = {
        "dataset": args.dataset,
        "model": args.model,
        "images": len(data.train),
        "probes": len(probes),
        "probes_one_by_one": args.one_by_one,
        "seconds_caching": round(caching, 3),
        "seconds_batched": round(batched, 3),
        "seconds_one_by_one": round(single, 3),
        "ratio": round(single / batched, 1),
        "largest_relative_weight_difference": float(f"{worst:.2e}"),
        "largest_number_of_other_predictions": hits,
        "hardware": hardware(torch.device("cpu")),
    }
    print("\n".join(f"{key}: {value}" for key, value in row.items()))
    others = [
        line for line in read_cells(CSV) if (line["dataset"], line["model"]) != (args.dataset, args.model)
    ]
    write_rows(CSV, [*others, row])


if __name__ == "__main__":
    main()
