"""The heads that attackers train on features, other than logistic regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def linear_head(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Fit a linear head in closed form (Fisher's discriminant with Ledoit and Wolf's shrinkage).

    It is the head of attacks that need many: as linear as logistic regression, in a hundredth of its time.

    Args:
        train (`Tensor`), labels (`Tensor`): `(n, d)` and `(n,)`.
        test (`Tensor`): `(m, d)`.

    Returns:
        `Tensor`: logits `(m, k)` of the test features, float64, one column for each class of `labels`; of two
            classes only their difference, `(m,)`.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    # Equal priors: two classes that an edit made one are a tie, whichever has more images.
    equal = [1 / len(labels.unique())] * len(labels.unique())
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=equal)
    model.fit(train.double().numpy(), labels.numpy())
    return torch.from_numpy(model.decision_function(test.double().numpy()))


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, *, count: int) -> Tensor:
    """Take a vote of the nearest labelled features, by cosine.

    Args:
        train (`Tensor`), labels (`Tensor`): `(n, d)` and `(n,)`.
        test (`Tensor`): `(m, d)`.
        count (`int`): of neighbours.

    Returns:
        `Tensor`: logits `(m, k)` of the test features, float64, one column for each class of `labels`.
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
    """Train a perceptron with one hidden layer, with Adam at 1e-3, on standardised features.

    Args:
        features (`Callable`): epoch to features `(n, d)`, of the same samples in each epoch; it trains on
            their device.
        labels (`Tensor`): `(n,)`.
        num_classes (`int`): k.
        hidden (`int`), epochs (`int`), batch_size (`int`): of the training.
        seed (`int`): of weights and shuffles; the global random state is not touched.

    Returns:
        `nn.Module`: features `(m, d)` to logits `(m, k)`, without gradients.
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
