"""The ranking: the largest `lpips_d` among methods that remove the style and keep the content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..bootstrap import Estimate
from ..methods.registry import DIFFUSION, UNREGISTERED
from .rows import JOINT, Row
from .summary import Statistics, both_means


STYLE_GONE = 10.0  # percent of the forgotten artist's pictures that may still be recognised
CONTENT_KEPT = 90.0  # percent of what was recognised before


@dataclass(frozen=True)
class RankedMethod:
    """
    One line of the ranking.

    Attributes:
        qualifies (`str`):
            `"yes"` with `style_f` of at most 10 % and `content_f` of at least 90 % of its value before, else
            `"no"`; `"control"` for a control, which cannot win.
        behind, behind_low, behind_high (`float`):
            How far `lpips_d` is below the first line's, and the paired 95 % interval; 0 in it is a tie.
    """

    method: str
    erasures: int
    qualifies: Literal["yes", "no", "control"]
    style_f: float
    content_f_before: float
    content_f: float
    lpips_f: float
    lpips_r: float
    lpips_d: float
    behind: float
    behind_low: float
    behind_high: float


def rank(rows: Sequence[Row]) -> list[RankedMethod]:
    """
    Rank the methods on the pictures that every method has, of erasures of a single artist: those that qualify
    first, by `lpips_d`. Empty with fewer than two methods besides the controls, or if the pictures were not
    judged.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    single = [row for row in rows if JOINT not in row.forget]
    common = set.intersection(*({row.case for row in single if row.method == method} for method in methods))
    shared = [row for row in single if row.case in common]
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
        others = [row for row in own if row.artist and not row.is_forgotten]
        self.method, self.erasures = method, len({row.forget for row in own})
        self.lpips_f = statistics.mean(forgotten, lambda row: row.lpips)
        self.lpips_r = statistics.mean(others, lambda row: row.lpips)
        self.lpips_d: Estimate = self.lpips_f - self.lpips_r
        _, self.style = both_means(statistics, forgotten, Row.style)
        self.content_before, self.content = both_means(statistics, forgotten, Row.content)

    @property
    def qualifies(self) -> Literal["yes", "no", "control"]:
        if _is_control(self.method):
            return "control"
        is_gone = self.style.value <= STYLE_GONE
        is_kept = self.content.value >= CONTENT_KEPT / 100 * self.content_before.value
        return "yes" if is_gone and is_kept else "no"

    def behind(self, first: _Measured) -> RankedMethod:
        behind = first.lpips_d - self.lpips_d
        low, high = behind.interval
        return RankedMethod(
            method=self.method,
            erasures=self.erasures,
            qualifies=self.qualifies,
            style_f=float(self.style.value),
            content_f_before=float(self.content_before.value),
            content_f=float(self.content.value),
            lpips_f=float(self.lpips_f.value),
            lpips_r=float(self.lpips_r.value),
            lpips_d=float(self.lpips_d.value),
            behind=float(behind.value),
            behind_low=low,
            behind_high=high,
        )


def contenders(methods: Iterable[str]) -> list[str]:
    """The methods that can win, each once: all but the controls."""
    return [method for method in dict.fromkeys(methods) if not _is_control(method)]


def _is_control(method: str) -> bool:
    return DIFFUSION.get(method, UNREGISTERED).role == "control"


def _is_judged(row: Row) -> bool:
    return row.is_forgotten and row.style_after != "" and row.content_after is not None


def winner(ranking: Sequence[RankedMethod]) -> str:
    """Say in one sentence which method is first, and which are tied with it."""
    condition = (
        f"leave the style in at most {STYLE_GONE:g} % of the forgotten artist's pictures (style_f) and keep "
        f"what they show in at least {CONTENT_KEPT:g} % of those that showed it before (content_f)"
    )
    qualified = [line for line in ranking if line.qualifies == "yes"]
    if not qualified:
        return f"Nobody. A winner would have to {condition}."
    first = qualified[0]
    tied = [line.method for line in qualified[1:] if line.behind_low <= 0]
    ties = f", tied with {', '.join(tied)}" if tied else ""
    erasures = "one erasure" if first.erasures == 1 else f"{first.erasures} erasures"
    return (
        f"{first.method}{ties}, over {erasures}. Of the methods that {condition}, it has the largest "
        "lpips_d: how much further the forgotten artist's pictures moved than the others'. Ties are by "
        "paired 95 % intervals over prompts."
    )
