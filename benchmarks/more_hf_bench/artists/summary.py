"""From rows to `summary.csv`: one line per method and erasure, with bootstrap intervals over prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..bootstrap import ClusterBootstrap, Estimate
from ..columns import Column, rounded
from ..tables import POOLED
from .rows import SEPARATOR


DISTANCES = ("lpips", "lpips_64", "lpips_64_rece")
CLUSTERS = ["artist", "case_number"]  # a prompt, and the artist within which it is drawn

# The columns that are compared between methods, and which way is better; the arrows of all tables come from
# here.
COLUMNS = {
    column.name: column
    for column in (
        Column("lpips_f", better="up"),
        Column("lpips_r", better="down"),
        Column("lpips_d", better="up"),
        Column("lpips_64_rece_f", better="up"),
        Column("lpips_64_rece_r", better="down"),
        Column("lpips_64_rece_d", better="up"),
        Column("lpips_r_group", better="down"),
        Column("lpips_named", better="down"),
        Column("lpips_unnamed", better="down"),
        Column("lpips_none", better="down"),
        Column("style_f", "%", "down"),
        Column("style_r", "%", "up"),
        Column("content_f", "%", "up"),
        Column("content_r", "%", "up"),
        Column("content_none", "%", "up"),
        Column("clip_f", "CLIP score"),
        Column("clip_r", "CLIP score"),
    )
}

Confusion = Mapping[str, Mapping[str, float]]


def summarise(rows: pd.DataFrame, *, confusion: Confusion | None = None) -> list[dict[str, Any]]:
    """
    Summarise the rows of [`~more_hf_bench.artists.rows.measured`]: one line per method and erasure, then one
    per method over all its erasures of a single artist if it has several.

    The suffix of a column says which images it is about: `_f` the forgotten artists', `_r` all other
    artists', `_r_group` the other artists' of the same groups, `_named` those of artists that were passed to
    the method (targets, names to keep), `_unnamed` those of artists that were not, `_none` those without an
    artist. Percentages are 0 to 100. `_low` and `_high` are the 95 % bootstrap interval over prompts,
    `_change` is after minus before, prompt by prompt.

    `confusion`, {artist: {artist that the judge takes it for: percent}} on real images, gives `style_f_real`:
    how often real images of the targets are taken for the forgotten artist, below which `style_f` cannot be
    expected to fall.
    """
    lines = []
    for (method, forget), own in rows.groupby(["method", "forget"], sort=False):
        lines.append(_line(method, forget, own["remap_to"].iloc[0], own, confusion))
    for method, own in rows[rows["names"].map(len) == 1].groupby("method", sort=False):
        if own["forget"].nunique() > 1:
            lines.append(_line(method, POOLED, "", own, confusion))
    return lines


def _line(
    method: str, forget: str, remap_to: str, rows: pd.DataFrame, confusion: Confusion | None
) -> dict[str, Any]:
    groups = _split(rows)
    draws = ClusterBootstrap(rows[CLUSTERS])
    line: dict[str, Any] = {"method": method, "forget": forget, "remap_to": remap_to}
    line |= {f"n_{name}": len(groups[name]) for name in ("f", "r", "none")}

    for distance in DISTANCES:
        means = {name: draws.mean(group[distance]) for name, group in groups.items()}
        for name in ("f", "r"):
            line |= numbers(f"{distance}_{name}", means[name])
        line |= numbers(f"{distance}_d", means["f"] - means["r"])
        for name in ("r_group", "named", "unnamed", "none"):
            line |= numbers(f"{distance}_{name}", means[name])

    # A prompt without an artist asks for no style.
    judgements = {"style": ("f", "r", "unnamed"), "content": ("f", "r", "unnamed", "none")}
    if "clip_after" in rows:
        judgements["clip"] = judgements["content"]
    for judged, names in judgements.items():
        for name in names:
            before, after = (draws.mean(groups[name][f"{judged}_{when}"]) for when in ("before", "after"))
            line[f"{judged}_{name}_before"] = before.value
            line |= numbers(f"{judged}_{name}", after)
            line |= numbers(f"{judged}_{name}_change", after - before)

    line["style_f_real"] = _taken_for(rows, confusion)
    # Each row carries its erasure's cost, which counts once.
    line["seconds_prepare"] = _average(rows.drop_duplicates("forget", keep="last")["seconds_prepare"])
    line["seconds_per_image"] = _average(rows["seconds"])
    line["peak_memory"] = float(rows["peak_memory"].max())
    return rounded(line)


def _split(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows behind each suffix of the columns' names."""
    forgotten = rows[rows["is_forgotten"]]
    others = rows[(rows["concept"] != "") & ~rows["is_forgotten"]]
    groups = pd.MultiIndex.from_frame(forgotten[["forget", "group"]])
    in_group = pd.MultiIndex.from_frame(others[["forget", "group"]]).isin(groups)
    return {
        "f": forgotten,
        "r": others,
        "r_group": others[in_group],
        "named": others[others["is_named"]],
        "unnamed": others[~others["is_named"]],
        "none": rows[rows["concept"] == ""],
    }


def numbers(name: str, estimate: Estimate) -> dict[str, float]:
    """The columns of an estimate: its value and the ends of its interval."""
    low, high = np.round(estimate.interval, 6)
    return {name: estimate.value, f"{name}_low": low, f"{name}_high": high}


def _taken_for(rows: pd.DataFrame, confusion: Confusion | None) -> float | None:
    """
    How often the judge takes real images of the targets for the forgotten artist; `None` if there is no
    confusion for one of them.
    """
    pairs = set()
    for names, remap_to in set(zip(rows["names"], rows["remap_to"], strict=True)):
        pairs.update(itertools.product(names, remap_to.split(SEPARATOR)))
    if not confusion or any(name not in confusion for pair in pairs for name in pair):
        return None
    return _average([confusion[target].get(forget, 0.0) for forget, target in pairs])


def _average(values: Iterable[float]) -> float | None:
    measured = [value for value in values if not pd.isna(value)]
    return sum(measured) / len(measured) if measured else None
