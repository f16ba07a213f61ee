"""Every number of one edited classifier: one row of `rows.csv`, and a row of `probes.csv` for each probe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..splits import KDData, Splits, some_of_each
from .features import Cached
from .heads import difference_index, fit_perceptron, information, nearest_neighbours
from .metrics import (
    SPLITS,
    accuracy,
    auc,
    class_means,
    confidence,
    expert_load,
    kd_scores,
    linear_cka,
    loss_attack,
    modified_entropy,
    prototype_cosines,
    sample_losses,
    shadow_attack,
)
from .probes import LEARNING_RATES, RESOLUTION, Probe, converged_probe, probe_scores, sgd_probes


PAPER_RATE = 0.1  # the learning rate of the KR columns in the paper's main tables
CONVERGED = "converged"  # in place of the learning rate
PARTS = ("train", "test")
# The heads that are not linear: labelled images of each class, nearest neighbours, and the perceptron's.
LABELLED, NEIGHBOURS, HIDDEN, EPOCHS = 500, 5, 512, 30

Probes = dict[tuple[float | str, int], Probe]
"""Learning rate and seed to the probe."""


@dataclass(frozen=True)
class Shared:
    """Results that several runs on the same data and trained classifiers need: found once, then looked up."""

    probes: dict[str, Probes] = field(default_factory=dict)  # a hash of features to their probes
    # the same to the logits of heads that are not linear
    others: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    # seed to what the original's head reads
    inputs: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Which samples of a data set's parts belong to the splits."""

    mask: Mapping[str, Tensor]  # split to a boolean mask over its part
    labels: Mapping[str, Tensor]  # part to its labels
    num_classes: int  # k

    @classmethod
    def of(cls, data: KDData, splits: Splits) -> Places:
        mask = {
            "f": torch.isin(data.train.rows, splits.f.rows),
            "r": torch.isin(data.train.rows, splits.r.rows),
            "ft": torch.isin(data.test.rows, splits.ft.rows),
            "rt": torch.isin(data.test.rows, splits.rt.rows),
        }
        return cls(mask, {"train": data.train.labels, "test": data.test.labels}, len(data.class_names))

    def take(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Select from tensors of both parts those of each split."""
        part = {"f": "train", "r": "train", "ft": "test", "rt": "test"}
        return {split: values[part[split]][mask] for split, mask in self.mask.items()}


@dataclass(frozen=True)
class Informed:
    """What the index of information needs beside a classifier's features, in bits for every block."""

    blocks: list[float]  # of the classifier's blocks, without what its head reads
    # original, retrained: of the references, what their heads read at the end
    original: list[float]
    retrained: list[float]


@dataclass(frozen=True)
class Measurement:
    """What `measure` returns."""

    row: dict[str, Any]  # column to number
    probes: list[dict[str, Any]]  # the same for each probe
    means: Tensor  # `(k, d)`, class means of the training features, for the plots
    test_features: Tensor  # `(m, d)`, for the plots


def measure(
    cached: Cached,
    places: Places,
    *,
    forget: Sequence[int],
    targets: Sequence[int],
    original: Cached,
    retrained: Cached | None,
    original_means: Tensor,
    probe_seeds: Sequence[int],
    informed: Informed | None = None,
    passes: int = 1,
    shared: Shared,
) -> Measurement:
    """Measure accuracies, probes, membership attacks, similarities and expert load of a classifier.

    Similarities are taken to the original, whose class means of training features are `(k, d)`, and to
    Retrain; without Retrain, targets or `informed`, their columns stay empty. With several `passes`, features
    and logits are means over as many answers. The probes in `shared` are read and added to: the same features
    get the same probes.
    """
    labels = places.take(places.labels)
    features = {part: cached.features(part, passes=passes) for part in PARTS}
    logits = places.take({part: cached.logits(part, passes=passes) for part in PARTS})
    row: dict[str, Any] = kd_scores({split: accuracy(logits[split], labels[split]) for split in SPLITS})

    # A layer that draws is asked again in each epoch of a probe, unless an attacker has averaged it.
    redraws = cached.is_random and passes == 1
    key = _digest(features, tuple(probe_seeds), redraws)
    if key not in shared.probes:
        shared.probes[key] = _probes(cached, features, places, probe_seeds, redraws)
        shared.others[key] = _other_heads(cached, features, places, redraws)
    split_features = places.take(features)
    probes = []
    for (rate, seed), probe in shared.probes[key].items():
        scores = probe_scores(probe, split_features, labels, forget, targets)
        probes.append({"learning_rate": rate, "probe_seed": seed, **scores})
    row |= _retention(probes)
    row |= _others(shared.others[key], features, places)
    row |= _membership(logits, labels)

    row |= _alignment("original", split_features, original, places)
    row |= _alignment("retrain", split_features, retrained, places)
    means = class_means(features["train"], places.labels["train"], places.num_classes)
    row |= _cosines(original_means, means, forget)
    row["idi"] = None
    if informed is not None:
        bits = [*informed.blocks, head_information(features, places)]
        row["idi"] = difference_index(bits, informed.original, informed.retrained)
    experts = cached.experts("test")
    row["load_cv"] = None
    if experts is not None:
        row["load_cv"] = expert_load(experts[places.mask["ft"]], cached.routed.remap.num_experts)
    row |= {f"n_{split}": len(labels[split]) for split in SPLITS}
    return Measurement(row, probes, means, features["test"])


def _probes(
    cached: Cached, features: Mapping[str, Tensor], places: Places, seeds: Sequence[int], redraws: bool
) -> Probes:
    labels, device = places.labels["train"], cached.head.weight.device
    train = features["train"].to(device)

    def redrawn(epoch: int, seed: int) -> Tensor:
        # Draw 0 is the one that probes are evaluated on.
        return cached.features("train", draw=1 + epoch * (1 + max(seeds)) + seed).to(device)

    probes = sgd_probes(redrawn if redraws else train, labels, places.num_classes, seeds=seeds)
    return {**probes, (CONVERGED, 0): converged_probe(train, labels)}


def _retention(probes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The KR columns: means over the probes of the paper's learning rate, and the converged probe."""
    paper = [probe for probe in probes if probe["learning_rate"] == PAPER_RATE]
    (converged,) = [probe for probe in probes if probe["learning_rate"] == CONVERGED]
    names = [*(f"acc_{split}" for split in SPLITS), "hm", "hm_t"]
    return {
        **{f"kr_{name}": sum(probe[name] for probe in paper) / len(paper) for name in names},
        **{f"kr_converged_{name}": converged[name] for name in (*names, "auc_rest", "auc_target")},
    }


def _other_heads(
    cached: Cached, features: Mapping[str, Tensor], places: Places, redraws: bool
) -> dict[str, Tensor]:
    """Logits of test images by heads that are not linear, which see some labelled images of each class."""
    some = some_of_each(places.labels["train"], LABELLED)
    labels, train, test = places.labels["train"][some], features["train"][some], features["test"]
    asked = replace(cached, inputs={"train": cached.inputs["train"][some]})

    def redrawn(epoch: int) -> Tensor:
        return (asked.features("train", draw=1 + epoch) if redraws else train).to(cached.head.weight.device)

    size = {"hidden": HIDDEN, "epochs": EPOCHS, "seed": 0}
    perceptron = fit_perceptron(redrawn, labels, places.num_classes, **size)
    return {
        "knn": nearest_neighbours(train, labels, test, count=NEIGHBOURS),
        "mlp": perceptron(test.to(cached.head.weight.device)).cpu(),
    }


def _others(logits: Mapping[str, Tensor], features: Mapping[str, Tensor], places: Places) -> dict[str, float]:
    """The columns of these heads, and of a linear head for the forgotten against all others."""
    row = {}
    for name, of_test in logits.items():
        for split in ("ft", "rt"):
            mask = places.mask[split]
            row[f"kr_{name}_acc_{split}"] = accuracy(of_test[mask], places.labels["test"][mask])
    binary = converged_probe(features["train"], places.mask["f"].long())(features["test"])
    score = binary[:, 1] - binary[:, 0]
    ours, theirs = score[places.mask["ft"]], score[places.mask["rt"]]
    return row | {"kr_binary_auc_rest": auc(ours, theirs, resolution=RESOLUTION)}


def head_information(features: Mapping[str, Tensor], places: Places) -> float:
    """The information in what a head reads, by as many labelled images as the other heads have."""
    some = some_of_each(places.labels["train"], LABELLED)
    forgotten = {"train": places.mask["f"][some], "test": places.mask["ft"]}
    return information({"train": features["train"][some], "test": features["test"]}, forgotten)


def _membership(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, float]:
    """The three attacks: on the loss, on the confidence and on the entropy."""
    forget, unseen = (sample_losses(logits[split], labels[split]) for split in ("f", "ft"))
    row = loss_attack(forget, unseen)
    for name, number in (("confidence", confidence), ("entropy", modified_entropy)):
        seen, other, asked = (number(logits[split], labels[split]) for split in ("r", "rt", "f"))
        row[f"mia_{name}"] = shadow_attack(seen, other, asked)
    return row


def _alignment(
    name: str, features: Mapping[str, Tensor], other: Cached | None, places: Places
) -> dict[str, float | None]:
    """CKA with the training features of another classifier."""
    columns = {split: f"cka_{name}_{split}" for split in ("f", "r")}
    if other is None:
        return dict.fromkeys(columns.values())
    theirs = places.take({part: other.features(part) for part in PARTS})
    return {column: linear_cka(features[split], theirs[split]) for split, column in columns.items()}


def _cosines(before: Tensor, after: Tensor, forget: Sequence[int]) -> dict[str, float]:
    """The cosine of class means with themselves before: mean over forgotten, least of remaining classes."""
    cosines = prototype_cosines(before, after).diagonal()
    forgotten = torch.isin(torch.arange(len(cosines)), torch.tensor(list(forget)))
    return {"cosine_f": cosines[forgotten].mean().item(), "cosine_r": cosines[~forgotten].min().item()}


def _digest(features: Mapping[str, Tensor], *facts: Any) -> str:
    digest = hashlib.sha256(repr((facts, LEARNING_RATES)).encode())
    for part in PARTS:
        digest.update(features[part].contiguous().numpy().tobytes())
    return digest.hexdigest()
