"""Every number of one unlearned classifier: one row of `rows.csv`, and a row per probe."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..splits import KDData, Splits
from .features import Cached
from .membership import confidence, loss_attack, modified_entropy, sample_losses, shadow_attack
from .metrics import SPLITS, accuracy, expert_load, kd_scores
from .probes import LEARNING_RATES, Probe, converged_probe, probe_scores, sgd_probes
from .similarity import class_means, linear_cka, prototype_cosines


PAPER_RATE = 0.1  # the learning rate of the KR columns in the paper's main tables
CONVERGED = "converged"
MEASURED = ("acc_f", "acc_r", "acc_ft", "acc_rt", "hm", "hm_t")

KnownProbes = dict[str, dict[tuple[float | str, int], Probe]]
"""By a hash of the features: the probes by learning rate and seed."""


@dataclass(frozen=True)
class Places:
    """Which rows of a data set's `train` and `test` belong to the splits: boolean masks, and the labels of both."""

    part: dict[str, str]
    mask: dict[str, Tensor]
    labels: dict[str, Tensor]
    num_classes: int

    @classmethod
    def of(cls, data: KDData, splits: Splits) -> Places:
        part = {"f": "train", "r": "train", "ft": "test", "rt": "test"}
        rows = {"train": data.train.rows, "test": data.test.rows}
        masks = {name: torch.isin(rows[part[name]], getattr(splits, name).rows) for name in SPLITS}
        return cls(part, masks, {"train": data.train.labels, "test": data.test.labels}, len(data.class_names))

    def take(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """From tensors of `train` and `test` to those of the splits."""
        return {name: values[self.part[name]][self.mask[name]] for name in SPLITS}

    @property
    def of_split(self) -> dict[str, Tensor]:
        return self.take(self.labels)


@dataclass
class Measurement:
    """What `measure` found: the numbers of a row, a row per probe, and what the plots need."""

    row: dict[str, Any]
    probes: list[dict[str, Any]]
    means: Tensor  # (k, d), of training features
    test_features: Tensor  # (m, d)


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
    passes: int = 1,
    known_probes: KnownProbes,
) -> Measurement:
    """Accuracies, probes, membership attacks, similarities and expert load of a classifier.

    Args:
        cached (`Cached`): the unlearned classifier's head and what it reads.
        places (`Places`): where the splits are.
        forget, targets (`Sequence[int]`): class ids; without targets `auc_target` stays empty.
        original, retrained (`Cached`): what similarities are taken to; without Retrain that column stays empty.
        original_means (`Tensor`): `(k, d)`, Original's class means of training features.
        probe_seeds (`Sequence[int]`): of the probes.
        passes (`int`, defaults to 1): how often the head is asked; features and logits are means over that.
        known_probes (`dict`): features' hash to their probes; read and added to. The same features get the same probes.
    """
    labels = places.of_split
    features = {part: cached.features(part, passes=passes) for part in ("train", "test")}
    logits = places.take({part: cached.logits(part, passes=passes) for part in ("train", "test")})
    row: dict[str, Any] = kd_scores({split: accuracy(logits[split], labels[split]) for split in SPLITS})

    asked_again = cached.is_random and passes == 1
    key = _digest(features, tuple(probe_seeds), asked_again)
    if key not in known_probes:
        known_probes[key] = _probes(cached, features, places, probe_seeds, asked_again)
    split_features = places.take(features)
    probes = [
        {"learning_rate": rate, "probe_seed": seed, **probe_scores(probe, split_features, labels, forget, targets)}
        for (rate, seed), probe in known_probes[key].items()
    ]
    paper = [probe for probe in probes if probe["learning_rate"] == PAPER_RATE]
    (final,) = [probe for probe in probes if probe["learning_rate"] == CONVERGED]
    row |= {f"kr_{name}": sum(probe[name] for probe in paper) / len(paper) for name in MEASURED}
    row |= {f"kr_converged_{name}": final[name] for name in (*MEASURED, "auc_rest", "auc_target")}
    row |= _membership(logits, labels)

    row["cka_original_f"], row["cka_original_r"] = _similar(split_features, original, places)
    row["cka_retrain_f"], row["cka_retrain_r"] = (None, None) if retrained is None else _similar(split_features, retrained, places)
    means = class_means(features["train"], places.labels["train"], places.num_classes)
    cosines = prototype_cosines(original_means, means).diagonal()
    remaining = torch.ones(places.num_classes, dtype=torch.bool).index_fill(0, torch.tensor(list(forget)), False)
    row["cosine_f"], row["cosine_r"] = cosines[~remaining].mean().item(), cosines[remaining].min().item() if remaining.any() else None
    experts = cached.experts("test")
    row["load_cv"] = None if experts is None else expert_load(experts[places.mask["ft"]], cached.routed.remap.num_experts)["cv"]
    row |= {f"n_{split}": len(labels[split]) for split in SPLITS}
    return Measurement(row, probes, means, features["test"])


def _probes(
    cached: Cached, features: dict[str, Tensor], places: Places, seeds: Sequence[int], asked_again: bool
) -> dict[tuple[float | str, int], Probe]:
    labels, k = places.labels["train"], places.num_classes

    def redrawn(epoch: int, seed: int) -> Tensor:
        return cached.features("train", draw=1 + epoch * (1 + max(seeds)) + seed)  # draw 0 is what they are evaluated on

    probes = sgd_probes(redrawn if asked_again else features["train"], labels, k, seeds=seeds)
    return {**probes, (CONVERGED, 0): converged_probe(features["train"], labels, k)}


def _membership(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float | None]:
    """The loss attack against test samples of the same classes, or against all where there are none (random samples forgotten)."""
    unseen = "ft" if len(labels["ft"]) else "rt"
    losses = {split: sample_losses(logits[split], labels[split]) for split in ("f", unseen)}
    found = loss_attack(losses["f"], losses[unseen])
    for name, number in (("confidence", confidence), ("entropy", modified_entropy)):
        found[f"mia_{name}"] = shadow_attack(*(number(logits[split], labels[split]) for split in ("r", "rt", "f")))
    return found


def _similar(features: dict[str, Tensor], other: Cached, places: Places) -> tuple[float, float]:
    theirs = places.take({part: other.features(part) for part in ("train", "test")})
    return linear_cka(features["f"], theirs["f"]), linear_cka(features["r"], theirs["r"])


def _digest(features: dict[str, Tensor], *facts: Any) -> str:
    digest = hashlib.sha256(repr((facts, LEARNING_RATES)).encode())
    for part in ("train", "test"):
        digest.update(features[part].contiguous().numpy().tobytes())
    return digest.hexdigest()
