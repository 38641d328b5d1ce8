"""Where each call lies on the time axis: stretches in which nothing happens are folded, roles have lanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Sequence

from metagpt_localllm.reporting.phases import KINDS, Phase

__all__ = ["LANE_HEIGHT", "WIDTH", "Axis", "Fold", "axis_of", "paths", "rows_of"]

#: Units of the drawing: its whole width, and the height of one row of a lane (also pixels).
WIDTH, LANE_HEIGHT = 100_000, 22
#: Of each kind: how far its bar is from the row's upper end, and how high. Kinds differ in height, not in colour alone.
_BARS = {"queued": (9, 6), "pause": (11, 2), "prefill": (5, 14), "decode": (5, 14), "open": (8, 8), "failed": (1, 20)}
#: Idle time is folded where it is longer than this: seconds, and a part of the time that was worked.
_FOLD_SECONDS, _FOLD_PART = 60.0, 0.1
#: The width of a fold, as part of the time that was worked: of one, and of all together.
_FOLD_WIDTH, _ALL_FOLDS = 0.02, 0.2
#: Rows that a role has at the most for calls at the same time.
_ROWS = 6


@dataclass(frozen=True)
class Fold:
    """An idle stretch: moments in seconds since 1970, and how long it is on the axis."""

    begin: float
    end: float
    width: float


@dataclass(frozen=True)
class Axis:
    """The time axis. ``begin`` in seconds since 1970; ``length`` in seconds, with the folds as wide as they are drawn."""

    begin: float
    length: float
    folds: Sequence[Fold]

    def place(self, moment: float) -> float:
        """Seconds from the axis' beginning."""
        gone = 0.0
        for fold in self.folds:
            if moment >= fold.end:
                gone += fold.end - fold.begin - fold.width
            elif moment > fold.begin:
                return fold.begin - self.begin - gone + (moment - fold.begin) / (fold.end - fold.begin) * fold.width
            else:
                break
        return moment - self.begin - gone


def axis_of(spans: Iterable[tuple[float, float]]) -> Axis:
    """The axis on which these calls (begin, end) lie."""
    ordered = sorted(spans)
    if not ordered:
        return Axis(0.0, 1.0, ())
    begin = end = ordered[0][0]
    gaps, worked = [], 0.0
    for start, stop in ordered:
        if start > end:
            gaps.append((end, start))
        worked += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    worked = max(worked, 1e-3)
    idle = [gap for gap in gaps if gap[1] - gap[0] > max(_FOLD_SECONDS, _FOLD_PART * worked)]
    width = worked * min(_FOLD_WIDTH, _ALL_FOLDS / max(len(idle), 1))
    folds = tuple(Fold(start, stop, width) for start, stop in idle)
    folded = sum(fold.end - fold.begin - fold.width for fold in folds)
    return Axis(begin, max(end - begin - folded, 1e-3), folds)


def rows_of(spans: Sequence[tuple[float, float]]) -> list[int]:
    """In which row each of these calls of a role is drawn, so that calls at the same time do not hide each other.

    Args:
        spans: begin and end, in the order of their beginnings.
    """
    ends: list[float] = []
    rows = []
    for begin, end in spans:
        free = next((row for row, taken in enumerate(ends) if taken <= begin), len(ends))
        if free == len(ends) and free < _ROWS:
            ends.append(end)
        free = min(free, _ROWS - 1)
        ends[free] = max(ends[free], end)
        rows.append(free)
    return rows


def paths(calls: Iterable[tuple[int, Sequence[Phase]]], axis: Axis) -> dict[str, str]:
    """The path of all phases of each kind, for calls that are given as (row, phases)."""
    drawn: dict[str, list[str]] = {kind: [] for kind in KINDS}
    scale = WIDTH / axis.length
    for row, phases in calls:
        for phase in phases:
            above, height = _BARS[phase.kind]
            left = axis.place(phase.begin) * scale
            width = axis.place(phase.end) * scale - left
            if width < 0.05 and phase.kind in ("queued", "pause"):
                continue  # not to be seen however far one zooms in
            drawn[phase.kind].append(
                f"M{left:.1f} {row * LANE_HEIGHT + above}h{width:.1f}v{height}h-{width:.1f}z".replace(".0", "")
            )
    return {kind: "".join(parts) for kind, parts in drawn.items() if parts}
