"""Random samples forgotten: a tenth of the training images, of all classes (the paper's Table 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from more_hf.classification.heads import find_heads

from ..columns import rounded
from ..page import Section
from ..splits import Splits
from ..tables import with_interval
from .features import cache
from .metrics import accuracy, confidence, loss_attack, modified_entropy, sample_losses, shadow_attack
from .summary import COST, LOSS_ATTACK, REFERENCES, draw_row_accuracies, percentages, summary_line


SPLITS = ("f", "r", "rt")
ACCURACIES = percentages(*(f"acc_{split}" for split in SPLITS))
MEMBERS = percentages("mia_member", "mia_entropy_member")
NUMBERS = [*ACCURACIES, *LOSS_ATTACK, *MEMBERS, *COST]

GAP = "gap"  # Table 4's average distance to Retrain, which is over these:
COMPARED = ("acc_f", "acc_r", "acc_rt", "mia_member")
NOTE = (
    "To have forgotten single images is to behave like a model that was trained without them: the closer to "
    "retrain, the better. acc_rt is the whole test set. mia_member: percent of forgotten samples that an "
    "attack on the confidence takes for training samples (the paper's Table 4 looks like this); mia_loss: "
    "accuracy of appendix B.3's attack on the loss, 50 is ideal. gap: mean absolute difference to retrain of "
    "acc_f, acc_r, acc_rt and mia_member, on the same seed; smaller is better. 95 % bootstrap intervals in "
    "brackets."
)
# What the columns of the page's table are, in plain words.
WORDS = {
    "acc_f": "forgotten images recognised, %",
    "acc_r": "other training images, %",
    "acc_rt": "test images, %",
    "mia_member": "forgotten taken for training images, by confidence, %",
    "mia_entropy_member": "the same, by entropy, %",
    "mia_loss": "an attack on the loss is right, %",
    "gap": "mean difference to retrain, points",
}


def measure_samples(edited: nn.Module, splits: Splits, device: torch.device) -> dict[str, Any]:
    """Measure accuracies and membership attacks of a classifier: the columns of a row."""
    edited = edited.to(device)
    (head, *_) = find_heads(edited, splits.f[[0, 1]]["pixel_values"].to(device)).values()
    parts = {"f": splits.f, "r": splits.r, "rt": splits.rt}
    cached = cache(edited, head, parts)
    logits = {name: cached.logits(name) for name in SPLITS}
    labels = {name: part.labels for name, part in parts.items()}

    def members(number) -> float:
        """Percent of the forgotten samples that an attack on a number takes for training samples."""
        return 100 - shadow_attack(*(number(logits[name], labels[name]) for name in ("r", "rt", "f")))

    forgotten, unseen = (sample_losses(logits[name], labels[name]) for name in ("f", "rt"))
    return {
        **{f"acc_{name}": accuracy(logits[name], labels[name]) for name in SPLITS},
        **loss_attack(forgotten, unseen),
        "mia_member": members(confidence),
        "mia_entropy_member": members(modified_entropy),
        **{f"n_{name}": len(labels[name]) for name in SPLITS},
    }


def summarise(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One line per method: means over seeds, intervals of accuracies, the average gap to Retrain."""
    numbers = rows.set_index("seed")[["method", *COMPARED]]
    retrained = numbers[numbers["method"] == "retrain"]
    lines = []
    for method, part in rows.groupby("method", sort=False):
        drawn, _ = draw_row_accuracies(part, [column.name for column in ACCURACIES])
        line = summary_line(method, part["forget"].iloc[0], part, NUMBERS, drawn)
        gaps = numbers[numbers["method"] == method][list(COMPARED)] - retrained[list(COMPARED)]
        lines.append({**line, **rounded({GAP: gaps.abs().stack().mean()})})
    return lines


def finding(summary: Sequence[Mapping[str, Any]]) -> str:
    """Say in plain words which method comes closest to retraining, and whether doing nothing is as close."""
    lines = {line["method"]: line for line in summary}
    rivals = [line for name, line in lines.items() if name not in REFERENCES and line[GAP] is not None]
    if "original" not in lines or not rivals:
        return "Original, retrain and a method are needed to say how close a method comes to retraining."
    original, retrained = lines["original"], lines["retrain"]
    best = min(rivals, key=lambda line: line[GAP])
    closer = [line["method"] for line in rivals if line[GAP] < original[GAP]]
    return (
        f"The original recognises {original['acc_f']:.1f} % of the forgotten images, a model retrained "
        f"without them {retrained['acc_f']:.1f} %. {best['method']} comes closest to retraining: its numbers "
        f"differ by {best[GAP]:.2f} points on average, those of the original by {original[GAP]:.2f}. "
        f"{len(closer)} of {len(rivals)} methods are closer than doing nothing."
    )


def short_table(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Table 4's columns and the other attack."""
    return [
        {
            "method": line["method"],
            "seeds": line["seeds"],
            **{column.name: with_interval(line, column.name, ".2f", ".1f") for column in ACCURACIES},
            **{column.name: column.format(line[column.name], 2) for column in MEMBERS},
            "mia_loss": with_interval(line, "mia_loss", ".2f", ".1f"),
            "gap ↓": "" if line[GAP] is None else f"{line['gap']:.2f}",
            COST[0].name: COST[0].format(line[COST[0].name], 2),
        }
        for line in summary
    ]


def sections(summary: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The one table, with its notes."""
    return [Section("Distance to retraining", NOTE, short_table(summary))]
