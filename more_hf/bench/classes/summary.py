"""From rows to numbers: one line per method and forgotten classes, with bootstrap intervals. Pure functions of the rows."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


Row = Mapping[str, Any]

POOLED = "all"  # in the column `forget`: every erasure of the method together
DRAWS = 5000
ACCURACIES = ("acc_f", "acc_r", "acc_ft", "acc_rt")
GROUPS = ("", "kr_", "kr_converged_")  # the model's own head, the paper's new heads, the converged new head
TEXTS = ("method", "forget", "sent_to")
COUNTS = ("n_f", "n_r", "n_ft", "n_rt")

BETTER = {
    **{f"{group}{name}": "down" if name in ("acc_f", "acc_ft") else "up" for group in GROUPS for name in (*ACCURACIES, "hm", "hm_t")},
    "seconds": "down",
    "peak_memory": "down",
}
"""Which way is better. What is not here has none of its own: a membership attack or a similarity is compared with Retrain's."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read `rows.csv` or `probes.csv`: texts, whole numbers for seeds and counts, floats, `None` for an empty cell."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{column: _value(column, text) for column, text in line.items()} for line in csv.DictReader(file)]


def _value(column: str, text: str) -> Any:
    if column in TEXTS or (column == "learning_rate" and text.isalpha()):
        return text
    if not text:
        return None
    return int(text) if column in (*COUNTS, "seed", "probe_seed") else float(text)


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line per method and entry of `forget`, then one per method over all its entries where there are several.

    Every number is the mean over rows. Accuracies and harmonic means have a 95 % bootstrap interval, `_low` and `_high`: rows (seeds,
    erasures) are drawn with replacement, and in each the hits among its n samples from a binomial. `seeds` says how many rows there
    are, `n_f` and `n_r` how many training samples are forgotten and remain in one of them.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["forget"]), []).append(row)
    several = {method for method, _ in groups if sum(other == method for other, _ in groups) > 1}
    lines = [_line(method, forget, part) for (method, forget), part in groups.items()]
    for method in dict.fromkeys(method for method, _ in groups):
        if method in several:
            lines.append(_line(method, POOLED, [row for row in rows if row["method"] == method]))
    return lines


def _line(method: str, forget: str, rows: Sequence[Row]) -> dict[str, Any]:
    line: dict[str, Any] = {"method": method, "forget": forget, "seeds": len(rows), "n_f": rows[0]["n_f"], "n_r": rows[0]["n_r"]}
    drawn = _drawn(rows)
    for column in rows[0]:
        if column in (*TEXTS, *COUNTS, "seed"):
            continue
        values = [row[column] for row in rows if row[column] is not None]
        line[column] = round(float(np.mean(values)), 6) if values else None
        if column in drawn:
            low, high = np.quantile(drawn[column], (0.025, 0.975))
            line[f"{column}_low"], line[f"{column}_high"] = round(float(low), 6), round(float(high), 6)
    return line


def _drawn(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The mean over rows of each accuracy and harmonic mean in every draw, `(draws,)`."""
    names = [f"{group}{name}" for group in GROUPS for name in ACCURACIES]
    found = draw_hits(rows, {name: name.rpartition("acc_")[2] for name in names})
    for group in GROUPS:
        for hm, f, r in (("hm", "acc_f", "acc_r"), ("hm_t", "acc_ft", "acc_rt")):
            found[f"{group}{hm}"] = _harmonic(100 - found[f"{group}{f}"], found[f"{group}{r}"])
    return {name: values.mean(1) for name, values in found.items()}


def draw_hits(rows: Sequence[Row], splits: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Bootstrap draws `(draws, rows)` of accuracies in percent: rows with replacement, in each as many hits as a binomial gives.

    `splits` is the split of each column's accuracy: the sample count of `acc_f` is in `n_f`.
    """
    generator = np.random.default_rng(0)
    picks = generator.integers(len(rows), size=(DRAWS, len(rows)))
    found = {}
    for column, split in splits.items():
        n, chance = (np.array([row[name] for row in rows])[picks] for name in (f"n_{split}", column))
        found[column] = 100 * generator.binomial(n, np.clip(chance / 100, 0, 1)) / n
    return found


def _harmonic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 2 * a * b / np.maximum(a + b, 1e-12)
