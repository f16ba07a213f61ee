"""The ranking: the largest `lpips_d` among methods that remove the style and keep the content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..bootstrap import Estimate
from ..methods.registry import DIFFUSION, UNREGISTERED
from .kinds import ARTISTS, Kind
from .rows import Row
from .summary import Statistics, both_means


STYLE_GONE = 10.0  # percent of the forgotten artist's pictures that may still be recognised
CONTENT_KEPT = 90.0  # percent of what was recognised before


@dataclass(frozen=True)
class RankedMethod:
    """
    One line of the ranking.

    Attributes:
        qualifies (`str`):
            `"yes"` if what is forgotten is still recognised in at most 10 % of its pictures, and what else
            must be seen in at least 90 % of those that had it before (`Kind.spared`), else `"no"`;
            `"control"` for a control, which cannot win.
        gone_f, gone_r (`float`):
            Percent of the forgotten pictures in which their artist or thing is recognised, and of the others.
        kept_f (`float`):
            Percent of the forgotten pictures that still show what else was asked for.
        behind, behind_low, behind_high (`float`):
            How far `lpips_d` is below the first line's, and the paired 95 % interval; 0 in it is a tie.
    """

    method: str
    erasures: int
    qualifies: Literal["yes", "no", "control"]
    gone_f_before: float | None
    gone_f: float
    kept_f_before: float
    kept_f: float
    gone_r_before: float | None
    gone_r: float | None
    lpips_f: float
    lpips_r: float
    lpips_d: float
    behind: float
    behind_low: float
    behind_high: float


def rank(rows: Sequence[Row], size: int = 1) -> list[RankedMethod]:
    """
    Rank the methods on the pictures that every method has, of erasures of `size` names: those that qualify
    first, by `lpips_d`. Empty with fewer than two methods besides the controls, or if the pictures were not
    judged.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    sized = [row for row in rows if len(row.forgotten) == size]
    common = set.intersection(*({row.case for row in sized if row.method == method} for method in methods))
    shared = [row for row in sized if row.case in common]
    if len(contenders(methods)) < 2 or not any(map(_is_judged, shared)):
        return []

    statistics = Statistics(shared)
    measured = [_Measured(method, shared, statistics) for method in methods]
    order = ("yes", "no", "control")
    measured.sort(key=lambda line: (order.index(line.qualifies), -line.lpips_d.value))
    return [line.behind(measured[0]) for line in measured]


class _Measured:
    """What the ranking compares, of one method."""

    def __init__(self, method: str, rows: Sequence[Row], statistics: Statistics):
        own = [row for row in rows if row.method == method]
        forgotten = [row for row in own if row.is_forgotten]
        others = [row for row in own if row.concept and not row.is_forgotten]
        self.kind = own[0].kind
        gone, kept = (getattr(Row, name) for name in (self.kind.gone, self.kind.kept))
        self.method, self.erasures = method, len({row.forget for row in own})
        self.lpips_f = statistics.mean(forgotten, lambda row: row.lpips)
        self.lpips_r = statistics.mean(others, lambda row: row.lpips)
        self.lpips_d: Estimate = self.lpips_f - self.lpips_r
        self.gone = both_means(statistics, forgotten, gone)
        self.kept = both_means(statistics, forgotten, kept)
        self.rest = both_means(statistics, others, gone)

    @property
    def qualifies(self) -> Literal["yes", "no", "control"]:
        if _is_control(self.method):
            return "control"
        is_gone = self.gone[1].value <= STYLE_GONE
        before, after = self.kept if self.kind.spared == "f" else self.rest
        is_kept = after.value >= CONTENT_KEPT / 100 * before.value
        return "yes" if is_gone and is_kept else "no"

    def behind(self, first: _Measured) -> RankedMethod:
        behind = first.lpips_d - self.lpips_d
        low, high = behind.interval
        return RankedMethod(
            method=self.method,
            erasures=self.erasures,
            qualifies=self.qualifies,
            gone_f_before=_value(self.gone[0]),
            gone_f=float(self.gone[1].value),
            kept_f_before=float(self.kept[0].value),
            kept_f=float(self.kept[1].value),
            gone_r_before=_value(self.rest[0]),
            gone_r=_value(self.rest[1]),
            lpips_f=float(self.lpips_f.value),
            lpips_r=float(self.lpips_r.value),
            lpips_d=float(self.lpips_d.value),
            behind=float(behind.value),
            behind_low=low,
            behind_high=high,
        )


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else float(estimate.value)


def contenders(methods: Iterable[str]) -> list[str]:
    """The methods that can win, each once: all but the controls."""
    return [method for method in dict.fromkeys(methods) if not _is_control(method)]


def _is_control(method: str) -> bool:
    return DIFFUSION.get(method, UNREGISTERED).role == "control"


def _is_judged(row: Row) -> bool:
    return row.is_forgotten and row.style_after != "" and row.content_after is not None


def winner(ranking: Sequence[RankedMethod], kind: Kind = ARTISTS) -> str:
    """Say in one sentence which method is first, and which are tied with it."""
    condition = kind.condition.format(STYLE_GONE, CONTENT_KEPT)
    qualified = [line for line in ranking if line.qualifies == "yes"]
    if not qualified:
        return f"Nobody. A winner would have to {condition}."
    first = qualified[0]
    tied = [line.method for line in qualified[1:] if line.behind_low <= 0]
    ties = f", tied with {', '.join(tied)}" if tied else ""
    erasures = "one erasure" if first.erasures == 1 else f"{first.erasures} erasures"
    return (
        f"{first.method}{ties}, over {erasures}. Of the methods that {condition}, it has the largest "
        f"lpips_d: how much further the forgotten {kind.one}'s pictures moved than the others'. Ties are by "
        "paired 95 % intervals over prompts."
    )
