"""The heads that attackers train on features, other than logistic regression, and how much by one of them a
classifier's blocks tell about who is forgotten: the information difference index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from more_hf.classification.heads import evaluating

from ..splits import ImageSet


def linear_head(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Fit a linear head in closed form (Fisher's discriminant with Ledoit and Wolf's shrinkage): logits `(m,
    k)` of the test features, float64, one column for each class of `labels`; of two classes only their
    difference, `(m,)`.

    It is the head of attacks that need many: as linear as logistic regression, in a hundredth of its time.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    # Equal priors: two classes that an edit made one are a tie, whichever has more images.
    equal = [1 / len(labels.unique())] * len(labels.unique())
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=equal)
    model.fit(train.double().numpy(), labels.numpy())
    return torch.from_numpy(model.decision_function(test.double().numpy()))


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, *, count: int) -> Tensor:
    """Take a vote of the `count` nearest labelled features, by cosine: logits `(m, k)` of the test features,
    float64, one column for each class of `labels`.
    """
    from sklearn.neighbors import KNeighborsClassifier

    return class_logits(KNeighborsClassifier(count, metric="cosine"), train, labels, test)


def class_logits(model: Any, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Fit a classifier of scikit-learn's, and return the logarithms of its probabilities of test features."""
    model.fit(train.double().numpy(), labels.numpy())
    return torch.from_numpy(model.predict_proba(test.double().numpy())).clamp_min(1e-12).log()


def fit_perceptron(
    features: Callable[[int], Tensor],
    labels: Tensor,
    num_classes: int,
    *,
    hidden: int,
    epochs: int,
    seed: int,
    batch_size: int = 64,
) -> nn.Module:
    """Train a perceptron with one hidden layer, with Adam at 1e-3, on standardised features: a module from
    features `(m, d)` to logits `(m, k)`, without gradients.

    `features` gives those of an epoch, `(n, d)`, of the same samples in each; it trains on their device.
    `seed` is of weights and shuffles; the global random state is not touched.
    """
    first = features(0)
    labels = labels.to(first.device)
    mean, scale = first.mean(0), first.std(0).clamp_min(1e-3 * float(first.std()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(first.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
        net.to(first.device)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for epoch in range(epochs):
            z = (features(epoch) - mean) / scale
            for rows in torch.randperm(len(z)).split(batch_size):
                nn.functional.cross_entropy(net(z[rows]), labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    # The scaling becomes a part of the first layer.
    with torch.no_grad():
        net[0].weight /= scale
        net[0].bias -= net[0].weight @ mean
    return net.requires_grad_(False)


HIDDEN, EPOCHS = 128, 20  # of the perceptrons

Features = Mapping[str, Tensor]
"""Part, `"train"` or `"test"`, to `(n, d)`."""


def difference_index(
    bits: Sequence[float], original: Sequence[float], retrained: Sequence[float]
) -> float | None:
    """The information difference index (Jeon et al., arXiv 2405.17878): 0 for Retrain, 1 for the original;
    `None` where Retrain's features tell as much as the original's.

    Σ max(0, I(Z; Y) − I_retrain(Z; Y)) over every block's output and what the head reads, over the same of
    the original. Y is whether an image is of a forgotten class; the three lists are I(Z; Y) in the same order
    of blocks.
    """
    ours, whole = (
        sum(max(0.0, a - b) for a, b in zip(of, retrained, strict=True)) for of in (bits, original)
    )
    return ours / whole if whole else None


def information(
    features: Features, forgotten: Features, *, hidden: int = HIDDEN, epochs: int = EPOCHS
) -> float:
    """A lower bound of I(Z; Y) in bits, 0 at least, where the paper has the bound of a contrastive critic; Z
    are features `(n, d)`, Y whether each is forgotten.

    It is H(Y) less the cross-entropy on test images of a perceptron that is fitted on training images.
    """
    known, asked = (forgotten[part].long() for part in ("train", "test"))
    train = features["train"]
    net = fit_perceptron(lambda epoch: train, known, 2, hidden=hidden, epochs=epochs, seed=0)
    share = asked.double().mean()
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    found = entropy - nn.functional.cross_entropy(net(features["test"]).double(), asked)
    return max(0.0, float(found) / math.log(2))


def block_features(model: nn.Module, parts: Mapping[str, ImageSet]) -> list[dict[str, Tensor]]:
    """The mean over positions or tokens of every block's output, `(n, channels)` for each part.

    The blocks are the elements of the classifier's longest list of modules, those that have parameters.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    blocks = [block for block in max(lists, key=len) if any(True for _ in block.parameters())]
    outputs: dict[int, list[Tensor]] = {i: [] for i in range(len(blocks))}

    def keep(i: int, output: Tensor) -> None:
        # (n, c, height, width) of a convolution, (n, tokens, c) of a transformer
        output = output.flatten(2) if output.ndim == 4 else output.mT
        outputs[i].append(output.mean(-1).float().cpu())

    with evaluating(model), ExitStack() as hooks:
        for i, block in enumerate(blocks):
            handle = block.register_forward_hook(lambda module, args, output, i=i: keep(i, output))
            hooks.callback(handle.remove)
        for images in parts.values():
            for batch in images.loader(100):
                model(batch["pixel_values"].to(next(model.parameters()).device))
    sizes = [len(images) for images in parts.values()]
    return [dict(zip(parts, torch.cat(outputs[i]).split(sizes), strict=True)) for i in outputs]
