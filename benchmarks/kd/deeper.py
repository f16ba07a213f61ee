"""Deeper than the head, at rest and in closed form: what a new head still finds of a class.

    python benchmarks/kd/deeper.py --models MODELS --model fashion-mnist-vit --forget trouser coat

What is saved of `erase_classes` forgets at the logits, and its features are the original's. Here every linear
layer and convolution before the head is edited too, one after the other in the order in which they run, each
with what it reads once those before it are edited; then the head, as always. A convolution is a linear layer
that reads patches. In a ViT our expert is also folded into all that is added to the residual stream. Rows
are added to `deeper.csv` (a row that is there is not measured again), and the means over classes are written
to `deeper.md`:

- `acc_ft`, `acc_rt`: what the classifier's own head recognises of the forgotten class and of the others.
- `probe_ft`, `probe_rt`: what a new linear head, trained to the end on 200 images a class, finds in its
  features; `gap_closed`: how much of the way from Original's `probe_ft` to Retrain's that is, in percent.
- `idi`: the information difference index over all blocks, 1 for Original and 0 for Retrain.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, unfold
from transformers import ViTForImageClassification

from more_hf.classification.erase import erase_classes
from more_hf.classification.heads import evaluating, find_heads
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.core.moment import Moment
from more_hf.core.prototypes import PrototypeFitter, Prototypes
from more_hf.core.remap import Remap
from more_hf.data import load_classifier
from more_hf_bench.attacks.classes.features import similarity
from more_hf_bench.attacks.classes.run import random_weights
from more_hf_bench.attacks.classes.victim import Seen, Victim
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.features import cache, reloaded
from more_hf_bench.classes.probes import converged_probe
from more_hf_bench.classes.training import Recipe, accuracy, train_classifier, without
from more_hf_bench.columns import read_cells, read_rows, write_rows
from more_hf_bench.methods.classification.layers import projected
from more_hf_bench.script import argument_parser
from more_hf_bench.splits import ImageSet, KDData, some_of_each, split_by_class


HERE = Path(__file__).parent
SEEN, POSITIONS = 100, 16  # images of each class behind the edits, and positions of each that a layer shows
LABELLED = 200  # images of each class that a new head is trained on
ASKED = 200  # and of each other class in the test
RIDGE = 1e-3  # of the regressions, in units of the mean square of what a layer reads
COLUMNS = ("acc_ft", "acc_rt", "probe_ft", "probe_rt", "gap_closed", "idi")


@dataclass(frozen=True)
class Task:
    """One class to forget from one classifier.

    Attributes:
        data (`KDData`): all images.
        forget (`int`): the class.
        original (`nn.Module`): the classifier, and `head` (`str`) the name of its last layer.
        images (`ImageSet`): `SEEN` training images of each class.
        partner (`Tensor`): `(n,)`, for each of them another one of a class that remains: the nearest by what
            the head reads once the class is remapped there.
    """

    data: KDData
    forget: int
    original: nn.Module
    head: str
    images: ImageSet
    partner: Tensor

    @property
    def own(self) -> Tensor:
        """Which images are of the forgotten class, boolean `(n,)`."""
        return self.images.labels == self.forget

    def prototypes(self, z: Tensor) -> Prototypes:
        """Class means and second moment of what a layer reads, `(n, positions, d)`."""
        fitter = PrototypeFitter(z.shape[-1], self.data.class_names)
        fitter.update(z, self.images.labels[:, None].expand(z.shape[:2])).update_moment(z)
        return fitter.prototypes

    def remap(self, z: Tensor, **how: Any) -> Remap:
        """Our remap of what a layer reads, to the class of most partners; in the covariance metric, or as
        `Remap.fit` takes it."""
        labels, names = self.images.labels, self.data.class_names
        target = names[int(labels[self.partner[self.own]].mode().values)]
        forget = names[self.forget]
        P = self.prototypes(z).without([name for name in names if name not in (forget, target)])
        return Remap.fit(P, [forget], [[target]], **({"solver": "covariance"} | how))

    @property
    def sent(self) -> tuple[list[str], list[list[str]]]:
        """The forgotten class, and every other class as an expert's target."""
        names = self.data.class_names
        return [names[self.forget]], [[name] for i, name in enumerate(names) if i != self.forget]


# The edits of one layer: from its weight `(out, d)`, its bias or None, and what it reads before all edits and
# now, `(n, positions, d)`, to the new weight and bias.
Weights = tuple[Tensor, Tensor | None]


def projection(task: Task, weight: Tensor, bias: Tensor | None, before: Tensor, now: Tensor) -> Weights:
    """DAMP's: project out what the class mean has that no combination of the other means has."""
    P = task.prototypes(now).matrix
    others = P[:, [i for i in range(P.shape[1]) if i != task.forget]]
    mean = P[:, task.forget]
    residual = mean - others @ torch.linalg.lstsq(others, mean[:, None]).solution[:, 0]
    if residual.norm() < 1e-6 * mean.norm():  # narrower than there are classes: nothing is left to project
        return weight, bias
    u = normalize(residual, dim=0)
    return weight - torch.outer(weight @ u, u), bias


def kodge(task: Task, weight: Tensor, bias: Tensor | None, before: Tensor, now: Tensor) -> Weights:
    """Kodge et al.'s, with their settings for CIFAR-10: what the class fills of the inputs and no other does
    goes, by what the layer read before all edits."""
    others, own = (before[mask].flatten(0, 1) for mask in (~task.own, task.own))
    return projected(weight, others.T @ others, own.T @ own, 100.0, 3.0), bias


def remapping(
    task: Task, weight: Tensor, bias: Tensor | None, before: Tensor, now: Tensor, **how: Any
) -> Weights:
    """Ours at every layer: the class mean becomes that of most partners' class, and all else moves least.

    By what the layer read before all edits: after those in front of it the two means are one already.
    """
    return task.remap(before, **how).merged(weight), bias


def regression(
    task: Task,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    now: Tensor,
    *,
    softness: float = 1.0,
) -> Weights:
    """The one inside the denoiser: the step from mean to mean, as nearly as ordinary activations allow."""
    z = now[task.own].flatten(0, 1)
    own = Moment(z.T @ z / len(z), len(z))
    remap = Remap.regress(task.prototypes(now), *task.sent, own, softness=softness)
    return remap.merged(weight), bias


def paired(
    task: Task,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    now: Tensor,
    *,
    alike: bool = False,
    rank: int | None = None,
) -> Weights:
    """Affine, image by image: the layer answers a forgotten image as the original answers its partner.

    W and b minimise Σ ‖W z + b − y‖² + ridge over all images, both groups with the same mass, or each image
    `alike`, where y is the original's output for the image itself if it remains, and for its partner if it
    does not. So what earlier edits did to the others is mended as well. With `rank`, only so many directions
    of the output change, those in which the answers of this layer, which the next one reads, change most.
    """
    answers = before @ weight.T
    answers[task.own] = answers[task.partner[task.own]]
    mass = torch.where(task.own, 1.0 if alike else (~task.own).sum() / task.own.sum(), 1.0).double()
    start = weight
    if bias is not None:  # a column for the constant
        now, start = (
            torch.cat([now, torch.ones_like(now[..., :1])], -1),
            torch.cat([weight, bias[:, None]], 1),
        )
        answers = answers + bias
    x, missed = now.flatten(0, 1), (answers - now @ start.T).flatten(0, 1)
    weighted = x * mass.repeat_interleave(now.shape[1])[:, None]
    moment = weighted.T @ x / len(x)
    moment += RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    change = torch.linalg.solve(moment, weighted.T @ missed / len(x)).T
    if rank is not None:
        directions = torch.linalg.svd(change @ torch.linalg.cholesky(moment), full_matrices=False).U[:, :rank]
        change = directions @ (directions.T @ change)
    edited = start + change
    return (edited, None) if bias is None else (edited[:, :-1], edited[:, -1])


Edit = Callable[[Task, Tensor, Tensor | None, Tensor, Tensor], Weights]
ATTEMPTS: dict[str, Edit | None] = {
    "head only": None,
    "projection": projection,
    "kodge": kodge,
    "remap, covariance": remapping,
    "regression": regression,
    "paired": paired,
    "paired, images alike": partial(paired, alike=True),
    "paired, 8 directions": partial(paired, rank=8),
}
REFERENCES = ("original", "retrain")
FOLDED = {"folded": 1, "folded, six rounds": 6}  # into the residual stream, a ViT's alone


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", default="fashion-mnist", help="a name of load_kd_data (fashion-mnist)")
    parser.add_argument("--model", required=True, help="a packaged classifier")
    parser.add_argument("--forget", nargs="+", required=True, help="classes, forgotten in turn")
    parser.add_argument("--epochs", type=int, default=1, help="of Retrain's training (1)")
    parser.add_argument("--models", type=Path, required=True, help="folder of Retrain's classifiers")
    args = parser.parse_args()

    data, original = load_kd_data(args.dataset), load_classifier(args.model).eval()
    attempts = [*ATTEMPTS, *(FOLDED if isinstance(original, ViTForImageClassification) else ())]
    table = HERE / "deeper.csv"
    for name in args.forget:
        done = {(row["model"], row["forget"], row["attempt"]) for row in read_cells(table)}
        if len([key for key in done if key[:2] == (args.model, name)]) == len(attempts) + 2:
            continue
        task = make_task(data, original, name)
        folder = args.models / f"{args.model}-{args.epochs}-{without(name, 0)}"
        judge = Judge.of(task, retrain(task, args.epochs, folder))
        for attempt in (*REFERENCES, *attempts):
            if (args.model, name, attempt) not in done:
                models = {"original": original, "retrain": judge.retrained.cached.model}
                model = models[attempt] if attempt in models else attempted(task, attempt)
                row = {"model": args.model, "forget": name, "attempt": attempt, **judge.measure(model)}
                write_rows(table, [*read_cells(table), row])
                print(row, flush=True)
    write_text(HERE / "deeper.md", markdown_table(means(read_rows(table))) + "\n")


def make_task(data: KDData, original: nn.Module, name: str) -> Task:
    """Draw the images behind the edits, and find the partners of those that are forgotten."""
    head = next(iter(find_heads(original, data.test[torch.arange(2)]["pixel_values"])))
    images = data.train.subset(some_of_each(data.train.labels, SEEN))
    task = Task(data, data.class_names.index(name), original, head, images, torch.arange(len(images)))
    z = reads(original, head, images)
    remap = Remap.fit(task.prototypes(z), *task.sent)
    z = normalize(remap.apply(z[:, 0]), dim=1)
    return replace(task, partner=(z @ z.T).masked_fill(task.own, -1).argmax(1))


def retrain(task: Task, epochs: int, folder: Path) -> nn.Module:
    """Train without the class, from random weights, or load what was trained."""
    data = task.data
    remaining = split_by_class(data, [data.class_names[task.forget]]).r
    start, recipe = random_weights(task.original, 0), Recipe.of(data, epochs=epochs)
    return train_classifier(start, remaining, recipe, output=folder)


def attempted(task: Task, attempt: str) -> nn.Module:
    """Edit a copy of the original before its head, then its head."""
    model = copy.deepcopy(task.original)
    if attempt in FOLDED:
        fold(task, model, FOLDED[attempt])
    elif ATTEMPTS[attempt] is not None:
        edit_layers(task, model, ATTEMPTS[attempt])
    return erased_head(task, model)


def erased_head(task: Task, model: nn.Module) -> nn.Module:
    """Erase the class from the head as well, and read what is saved."""
    # The head may cost anything: the table says what it did. What is saved comes back without its hook.
    erase_classes(model, task.images.loader(100), task.data.class_names[task.forget], most_lost=100)
    with reloaded(model) as plain:
        return plain


def edit_layers(task: Task, model: nn.Module, edit: Edit) -> None:
    """Edit every layer before the head, each with what it reads once those before it are edited."""
    for name in layers(model, task.head, task.data):
        before, now = (reads(m, name, task.images) for m in (task.original, model))
        layer = model.get_submodule(name)
        bias = None if layer.bias is None else layer.bias.detach().double()
        weight, bias = edit(task, layer.weight.detach().flatten(1).double(), bias, before, now)
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            if bias is not None:
                layer.bias.copy_(bias)


@torch.no_grad()
def fold(task: Task, model: ViTForImageClassification, rounds: int) -> None:
    """Put our expert E behind all that is added to the residual stream: Σ E w = E Σ w, the stream's end.

    E is the remap of the class token before the last norm. The blocks then read something else and answer it
    differently, so further rounds fit E again on what is there after the one before.
    """
    embeddings, layers = model.vit.embeddings, model.vit.layers
    writers = [embeddings.patch_embeddings.projection]
    writers += [writer for layer in layers for writer in (layer.attention.o_proj, layer.mlp.fc2)]
    # Each as a view whose rows are vectors of the stream.
    added = [tensor.flatten(1).T for writer in writers for tensor in (writer.weight, writer.bias[:, None])]
    added += [embeddings.cls_token[0], embeddings.position_embeddings[0]]
    for _ in range(rounds):
        remap = task.remap(reads(model, "vit.layernorm", task.images, shown=[0]))
        for rows in added:
            rows.copy_(remap.apply(rows))


def layers(model: nn.Module, head: str, data: KDData) -> list[str]:
    """The linear layers and convolutions before the head, in the order in which they run."""
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: order.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name != head
    ]
    with torch.no_grad():
        model(pixel_values=data.test[torch.arange(2)]["pixel_values"])
    for handle in handles:
        handle.remove()
    return order


@torch.no_grad()
def reads(model: nn.Module, name: str, images: ImageSet, shown: Sequence[int] | None = None) -> Tensor:
    """What a layer reads at some positions of each image, `(n, positions, d)`, float64: tokens or patches.

    The positions are drawn unless they are `shown`.
    """
    layer, seen = model.get_submodule(name), []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        z = args[0]
        if isinstance(layer, nn.Conv2d):
            z = unfold(z, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
        z = z if z.ndim == 3 else z[:, None]
        drawn = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(0))[:POSITIONS]
        seen.append(z[:, drawn if shown is None else shown])

    handle = layer.register_forward_pre_hook(keep)
    with evaluating(model):
        for batch in images.loader(100):
            model(pixel_values=batch["pixel_values"])
    handle.remove()
    return torch.cat(seen).double()


@dataclass(frozen=True)
class Judge:
    """Measures classifiers against Original and Retrain on the same images.

    Attributes:
        task (`Task`): what is forgotten from what.
        parts (`dict[str, ImageSet]`): labelled images, and those that are asked about.
        original, retrained (`Seen`): the references.
    """

    task: Task
    parts: dict[str, ImageSet]
    original: Seen
    retrained: Seen

    @classmethod
    def of(cls, task: Task, retrained: nn.Module) -> "Judge":
        train, test = task.data.train, task.data.test
        asked = (test.labels == task.forget).nonzero()[:, 0]
        others = some_of_each(test.labels, ASKED)
        asked = torch.cat([asked, others[test.labels[others] != task.forget]])
        labelled = train.subset(some_of_each(train.labels, LABELLED))
        parts = {"train": labelled, "test": test.subset(asked)}
        seen = [Seen(cache(m, m.get_submodule(task.head), parts)) for m in (task.original, retrained)]
        return cls(task, parts, *seen)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The columns of a row; `gap_closed` is of the means."""
        known = {self.original.cached.model: self.original, self.retrained.cached.model: self.retrained}
        seen = known.get(model) or Seen(cache(model, model.get_submodule(self.task.head), self.parts))
        row = {**self.recognised("acc", seen.cached.logits("test"))}
        probe = converged_probe(seen.cached.features("train"), self.parts["train"].labels)
        row |= self.recognised("probe", probe(seen.cached.features("test")))
        facts = {"head": self.task.head, "parts": self.parts, "forget": [self.task.forget], "targets": []}
        victim = Victim(seen, self.original, self.retrained, **facts, train=None, seed=0)
        index = next(result.recovered for result in similarity(victim) if result.measure == "idi")
        return {**row, "idi": round(index, 4)}

    def recognised(self, name: str, logits: Tensor) -> dict[str, float]:
        """Accuracies of the forgotten class and of the others, by logits of the test part."""
        labels = self.parts["test"].labels
        groups = {"ft": labels == self.task.forget, "rt": labels != self.task.forget}
        predicted = logits.argmax(-1)
        return {
            f"{name}_{split}": round(accuracy(predicted[mask], labels[mask]), 2)
            for split, mask in groups.items()
        }


def means(rows: pd.DataFrame) -> list[dict[str, str]]:
    """One line for each model and attempt: means over the classes that have every attempt.

    Folding comes last. It has lines of its own for the references if it was tried on other classes.
    """
    lines = []
    for model, own in rows.groupby("model", sort=False):
        at_layers, at_stream = (classes_with([*REFERENCES, *tried], own) for tried in (ATTEMPTS, FOLDED))
        lines += mean_lines(model, own, [*REFERENCES, *ATTEMPTS], at_layers)
        again = () if at_stream == at_layers else REFERENCES
        lines += mean_lines(model, own, [*again, *FOLDED], at_stream)
    return lines


def classes_with(attempts: list[str], rows: pd.DataFrame) -> list[str]:
    """The classes for which every one of the attempts was measured."""
    measured = rows[rows["attempt"].isin(attempts)].groupby("forget", sort=False).size()
    return measured.index[measured == len(attempts)].tolist()


def mean_lines(model: str, rows: pd.DataFrame, attempts: list[str], names: list[str]) -> list[dict[str, str]]:
    """A line for each attempt: means over the named classes; `gap_closed` is of the means."""
    if not names:
        return []
    found = rows[rows["forget"].isin(names)].groupby("attempt").mean(numeric_only=True)
    start, end = found.loc[list(REFERENCES), "probe_ft"]
    found["gap_closed"] = 100 * (start - found["probe_ft"]) / (start - end)
    cells = found.loc[attempts, list(COLUMNS)].map("{:.2f}".format).to_dict("index")
    about = {"model": model, "classes": ", ".join(names)}
    return [{"model": model, "attempt": attempt, **about, **cells[attempt]} for attempt in attempts]


if __name__ == "__main__":
    main()
