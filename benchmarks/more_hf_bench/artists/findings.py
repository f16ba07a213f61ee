"""Say in one plain sentence what an erasure did to the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from more_hf.core.markdown import number

from ..tables import POOLED, share
from .config import ARTISTS, JOINT, Kind
from .ranking import CONTENT_KEPT, STYLE_GONE, contenders


# LPIPS below which nobody sees a change, and below which one has to look for it. Shifting a picture of 64
# pixels by one pixel gives 0.02.
UNSEEN, SLIGHT = 0.01, 0.05


@dataclass(frozen=True)
class Finding:
    """The means of one erasure."""

    forgotten: str  # the erased name; names that were erased together are joined by `JOINT`
    # gone_before, gone_after: percent of its pictures in which it is recognised; `None` without judges
    gone_before: float | None
    gone_after: float | None
    # kept_before, kept_after: percent of its pictures that show what else the prompt asks for
    kept_before: float | None
    kept_after: float | None
    # lpips_f, lpips_r: how far its pictures moved, and those of the others
    lpips_f: float
    lpips_r: float | None
    kind: Kind = ARTISTS  # the kind of concept

    @classmethod
    def of_line(cls, line: Mapping[str, Any], kind: Kind) -> Finding:
        """The finding in a line of `summary.csv`."""
        judged = (line[f"{name}_f{end}"] for name in (kind.gone, kind.kept) for end in ("_before", ""))
        forgotten = f"the forgotten {kind.one}" if line["forget"] == POOLED else line["forget"]
        return cls(forgotten, *judged, line["lpips_f"], line["lpips_r"], kind)

    def __str__(self) -> str:
        parts = [self._forgotten()]
        if self.lpips_r is not None:
            parts.append(f"the other {self.kind.name}' pictures {_moved(self.lpips_r)}")
        return "; ".join(parts) + "."

    def _forgotten(self) -> str:
        if self.gone_after is None:
            moved = _moved(self.lpips_f)
            return f"{spelt(self.forgotten)}: the pictures {moved}, and nobody judged what they show"
        before, after = share(self.gone_before), share(self.gone_after)
        verb = "are" if JOINT in self.forgotten else "is"
        recognised = f"{spelt(self.forgotten)} {verb} recognised in {before} of the pictures before"
        if self.gone_before <= STYLE_GONE:
            text = f"{recognised}, so that there was hardly anything to erase, and in {after} after"
        elif self.gone_after > STYLE_GONE:
            text = f"The erasure did not succeed: {recognised} and still in {after} after"
        else:
            text = f"{recognised} and in {after} after"
        if self.kept_after is not None and self.kept_after < CONTENT_KEPT / 100 * self.kept_before:
            before, after = share(self.kept_before), share(self.kept_after)
            text += f", but what was asked for is seen in {after} of them ({before} before)"
        return text


def spelt(forgotten: str) -> str:
    """Names that were erased together, listed as in a sentence."""
    *others, last = forgotten.split(JOINT)
    return f"{', '.join(others)} and {last}" if others else last


def _moved(lpips: float) -> str:
    if lpips < UNSEEN:
        seen = "which nobody sees"
    elif lpips < SLIGHT:
        seen = "which one has to look for"
    else:
        seen = "which is plain to see"
    return f"moved by {number(lpips)} LPIPS on average, {seen}"


def finding(
    summary: Sequence[Mapping[str, Any]], ranking: Sequence[Mapping[str, Any]], kind: Kind = ARTISTS
) -> str:
    """
    Say what the first method of the ranking did (without a ranking, the first method that is not a control):
    over all erasures of a single name if there are several, else for each erasure.
    """
    methods = [line["method"] for line in ranking] or contenders(line["method"] for line in summary)
    if not methods:
        return "Only controls were run: nothing is erased here."
    method = methods[0]
    lines = [line for line in summary if line["method"] == method]
    shown = [line for line in lines if line["forget"] == POOLED] or lines
    return f"After {method}: {' '.join(str(Finding.of_line(line, kind)) for line in shown)}"
