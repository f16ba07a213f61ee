"""The ranking: the largest `lpips_d` among methods that remove the style and keep the content."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..bootstrap import Estimate
from ..methods.registry import DIFFUSION, UNREGISTERED
from .kinds import ARTISTS, Kind
from .rows import Row
from .summary import Statistics, both_means


if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE_GONE = 10.0  # the artist may still be recognised in this percentage of the forgotten pictures
CONTENT_KEPT = 90.0  # percent of what was recognised before


@dataclass(frozen=True)
class RankedMethod:
    """
    One line of the ranking.

    Attributes:
        qualifies (`str`):
            `"yes"` if the forgotten concept is still recognised in at most 10 % of its pictures, and the
            content to be spared (`Kind.spared`) in at least 90 % of the pictures that had it before; else
            `"no"`. `"control"` for a control, which cannot win.
        gone_f, gone_r (`float`):
            Percent of the forgotten pictures, and of the others, in which their artist or thing is
            recognised.
        kept_f (`float`):
            Percent of the forgotten pictures that still show what else the prompt asks for.
        behind, behind_low, behind_high (`float`):
            How far `lpips_d` is below the first line's, with its paired 95 % interval; a tie if it contains
            0.
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
    Rank the methods by `lpips_d`, those that qualify first, on the pictures that every method has of erasures
    of `size` names. Empty with fewer than two methods besides the controls, or without judges.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    shared = [row for row in shared_rows(rows) if len(row.forgotten) == size]
    if len(contenders(methods)) < 2 or not any(map(_is_judged, shared)):
        return []

    statistics = Statistics(shared)
    measured = [_Measured(method, shared, statistics) for method in methods]
    order = ("yes", "no", "control")
    measured.sort(key=lambda line: (order.index(line.qualifies), -line.lpips_d.value))
    return [line.behind(measured[0]) for line in measured]


def shared_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of the pictures that every method has, so that methods are compared on equal terms."""
    cases: dict[str, set[tuple[str, int, int]]] = {}
    for row in rows:
        cases.setdefault(row.method, set()).add(row.case)
    common = set.intersection(*cases.values())
    return [row for row in rows if row.case in common]


class _Measured:
    """One method's measurements that the ranking compares."""

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


def plot_method(axis: Axes, method: str, points: Mapping[float, float]) -> None:
    """Draw a method's line in a panel, ours thicker."""
    width = 2.5 if method.startswith("more") else 1.2
    axis.plot(list(points), list(points.values()), marker="o", markersize=4, linewidth=width, label=method)


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
