"""Would ImageNet's EfficientNet-Lite0 be a better judge of artist and thing than AlexNet is?

    python judge_networks.py --data DATA    # judge_networks.csv, judge_networks.md; ten minutes on one core

The same linear judges as in train_judges.py, on real images that they were not fitted on: things that the
judge of artists never saw, artists that the judge of things never saw, each image as it is and as the
pipeline's VAE gives it back. Every network is described in the same way, by mean, deviation and maximum of
its stages, and has the penalty that suits it best. Of the images besides the twenty things every third is
used, so the numbers are below those of the packaged judges.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from dataset import load_dataset
from torch import Tensor, nn
from torch.nn.functional import interpolate
from train_judges import MIN_ARTISTS, describe, folds_of, held_out, percent

from more_hf.data import load_lpips
from more_hf.tuning.judge import pooled_features
from more_hf_bench.script import argument_parser, write_table


HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "classifiers"))
from imagenet import load_model  # noqa: E402


EVERY = 3
PENALTIES = (30.0, 100.0, 300.0, 1000.0, 3000.0)


def pooled_stages(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """
    Describe images `(n, 3, H, W)` in [-1, 1] by the mean, deviation and maximum of the model's five stages
    and of its last layer before the head: `(n, 5376)` for EfficientNet-Lite0.
    """
    rows = []
    for batch in images.split(batch_size):
        x = interpolate(batch, size=(128, 128), mode="bilinear", align_corners=False)
        last, stages = model.forward_intermediates(x)
        pooled = []
        for h in (*stages, last):
            pooled += [h.mean((2, 3)), h.std((2, 3)), h.amax((2, 3))]
        rows.append(torch.cat(pooled, dim=1))
    return torch.cat(rows)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="what data.py wrote")
    data = load_dataset(parser.parse_args().data)

    # 1. The images: the twenty things, and a part of the others that most artists drew.
    common = torch.bincount(data.name)[data.name] >= min(MIN_ARTISTS, len(data.artists))
    others = (common & ~data.chosen).nonzero().flatten()[::EVERY]
    rows = torch.cat([data.chosen.nonzero().flatten(), others])
    artist, thing, chosen = data.artist[rows], data.thing[rows], data.chosen[rows]
    by_thing, by_artist = folds_of(data, rows)

    # 2. For each network, what the judges of each penalty say of the twenty things.
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "AlexNet": partial(pooled_features, load_lpips()),
        "EfficientNet-Lite0": partial(pooled_stages, load_model()),
    }
    lines = []
    for network, pooled in networks.items():
        features = describe(data, rows, pooled)
        z = (features - features.mean((0, 1))) / features.std((0, 1)).clamp(min=1e-6)
        for kind, labels, folds in (("artist", artist, by_thing), ("thing", thing, by_artist)):
            tried = []
            for penalty in PENALTIES:
                real, vae = held_out(z, labels, folds, penalty)[:, chosen] == labels[chosen]
                tried.append({"penalty": penalty, "real": percent(real), "through the VAE": percent(vae)})
            best = max(tried, key=lambda line: line["real"] + line["through the VAE"])
            lines.append({"network": network, "judge of": kind, **best})
    facts = f"Percent of {int(chosen.sum())} images held out; {len(rows)} images in all."
    write_table(HERE / "judge_networks", lines, below=facts)


if __name__ == "__main__":
    main()
