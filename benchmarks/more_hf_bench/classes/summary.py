"""From rows to `summary.csv`: the columns, and one line per method and entry, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..bootstrap import draw_accuracies, interval
from ..columns import Column, rounded
from ..tables import POOLED
from .metrics import harmonic_mean


Line = Mapping[str, Any]  # of `summary.csv`

RELOADED = "-reloaded"
INVERTED = "-inverted"
REFERENCES = ("original", "retrain")  # not methods: others are compared with them

GROUPS = ("", "kr_", "kr_converged_")  # the own head, the paper's new head, the converged one


def scores(group: str) -> list[Column]:
    """The accuracies and harmonic means of one head."""
    return [
        Column(f"{group}acc_f", "%", "down"),
        Column(f"{group}acc_r", "%", "up"),
        Column(f"{group}acc_ft", "%", "down"),
        Column(f"{group}acc_rt", "%", "up"),
        Column(f"{group}hm", "%", "up"),
        Column(f"{group}hm_t", "%", "up"),
    ]


def percentages(*names: str) -> list[Column]:
    """Columns in percent of which neither direction is better."""
    return [Column(name, "%") for name in names]


OWN_HEAD, NEW_HEAD = scores(""), scores("kr_")
CONVERGED = [*scores("kr_converged_"), *percentages("kr_converged_auc_rest", "kr_converged_auc_target")]
# Other attackers: nearest neighbours, a perceptron, and a linear head for the forgotten against all others.
OTHER_HEADS = [
    Column("kr_knn_acc_ft", "%", "down"),
    Column("kr_knn_acc_rt", "%", "up"),
    Column("kr_mlp_acc_ft", "%", "down"),
    Column("kr_mlp_acc_rt", "%", "up"),
    Column("kr_binary_auc_rest", "%"),
]
# Attacks and similarities are compared with Retrain's: neither direction is better.
LOSS_ATTACK = percentages("mia_loss", "mia_loss_low", "mia_loss_high", "mia_loss_auc")
MEMBERSHIP = [*LOSS_ATTACK, *percentages("mia_confidence", "mia_entropy")]
SIMILARITY = [
    *map(Column, ("cka_original_f", "cka_original_r", "cka_retrain_f", "cka_retrain_r")),
    *map(Column, ("rus_original", "rus_retrain", "cosine_f", "cosine_r", "load_cv", "idi")),
]
# Of the way from Original's kr_converged_acc_ft to Retrain's; above 100 a new head finds less than there.
GAP = Column("gap_closed", "%")
COST = [Column("seconds", "s", "down"), Column("peak_memory", "MiB", "down")]
NUMBERS = [*OWN_HEAD, *NEW_HEAD, *CONVERGED, *OTHER_HEADS, *MEMBERSHIP, *SIMILARITY, *COST]

SHORT = [
    *OWN_HEAD,
    *(column for column in NEW_HEAD if column.name in ("kr_acc_ft", "kr_hm_t")),
    *(column for column in CONVERGED if column.name == "kr_converged_acc_ft"),
    GAP,
    COST[0],
]


def summarise(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Summarise rows: a line per method and entry of `forget`, then one per method over its entries.

    Every number is the mean over rows. Accuracies and harmonic means have a 95 % bootstrap interval, `_low`
    and `_high`: rows (seeds, erasures) are drawn with replacement, and in each the hits among its n samples
    from a binomial. `seeds` is the number of rows; `n_f` and `n_r` count the training samples that are
    forgotten and remain in one of them.
    """
    if "cka_original_f" in rows:
        rows = rows.assign(**_representation_scores(rows))
    lines = [_line(*key, part) for key, part in rows.groupby(["method", "forget"], sort=False)]
    for method, part in rows.groupby("method", sort=False):
        if part["forget"].nunique() > 1:
            lines.append(_line(method, POOLED, part))
    return [{**line, GAP.name: _gap_closed(line, lines)} for line in lines]


def _representation_scores(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """
    POUR's representation unlearning score (Le et al., 2026), from 0 to 1: the harmonic mean of how far the
    forgotten features are from the original's, 1 − CKA, or how near to Retrain's, CKA, and of how near the
    others are.
    """
    unlike_original = 1 - rows["cka_original_f"]
    return {
        "rus_original": _mean(unlike_original, rows["cka_original_r"]),
        "rus_retrain": _mean(rows["cka_retrain_f"], rows["cka_retrain_r"]),
    }


def _gap_closed(line: Line, lines: Sequence[Line]) -> float | None:
    """
    How much of the way from Original to Retrain a line went, in percent, by what the converged head finds of
    the forgotten; `None` where one of them is missing or they are less than a point apart.
    """
    name = "kr_converged_acc_ft"
    found = {other["method"]: other[name] for other in lines if other["forget"] == line["forget"]}
    original, retrain = (found.get(reference) for reference in REFERENCES)
    if None in (original, retrain, line[name]) or original - retrain < 1:
        return None
    return round(100 * (original - line[name]) / (original - retrain), 6)


def _line(method: str, forget: str, rows: pd.DataFrame) -> dict[str, Any]:
    accuracies = [f"{group}acc_{split}" for group in GROUPS for split in ("f", "r", "ft", "rt")]
    drawn, picks = draw_row_accuracies(rows, accuracies)
    # Harmonic means are taken of the accuracies in the same draw.
    for group in GROUPS:
        for name, f, r in (("hm", "acc_f", "acc_r"), ("hm_t", "acc_ft", "acc_rt")):
            hm = harmonic_mean(drawn[group + f], drawn[group + r])
            if group == "kr_":
                # A row's accuracies are means over probes, and the mean of the probes' HM is not the HM of
                # these means. All probes are asked about the same samples, whose noise moves both alike.
                of_means = harmonic_mean(rows[group + f], rows[group + r])
                hm = np.clip(hm + (rows[group + name] - of_means).to_numpy()[picks], 0, 100)
            drawn[group + name] = hm
    return summary_line(method, forget, rows, NUMBERS, drawn)


def draw_row_accuracies(rows: pd.DataFrame, names: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    Bootstrap draws `(draws, rows)` of the named accuracies, and the rows that were drawn; the sample count of
    `acc_f` is in `n_f`.
    """
    counts = {name: rows["n_" + name.rpartition("acc_")[2]] for name in names}
    return draw_accuracies({name: (counts[name], rows[name]) for name in names})


def summary_line(
    method: str, forget: str, rows: pd.DataFrame, columns: Sequence[Column], drawn: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """
    One line of a summary: the mean over rows of each column that they have, with the interval of those drawn.
    """
    line = {"method": method, "forget": forget, "seeds": len(rows)}
    line |= {name: int(rows[name].iloc[0]) for name in ("n_f", "n_r")}
    for name in (column.name for column in columns if column.name in rows):
        line[name] = float(rows[name].astype(float).mean())
        if name in drawn:
            line[f"{name}_low"], line[f"{name}_high"] = interval(drawn[name].mean(1))
    return rounded(line)


def _mean(a: pd.Series, b: pd.Series) -> pd.Series:
    """The harmonic mean; 0 where one of them is."""
    return 2 * a * b / np.maximum(a + b, 1e-12)
