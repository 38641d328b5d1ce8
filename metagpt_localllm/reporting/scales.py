"""Where ticks and bins lie, and how the report writes its numbers."""

from __future__ import annotations

import math
from typing import Optional, Sequence

from metagpt_localllm.wording import duration, fixed

__all__ = [
    "LogScale", "apart", "bins", "count", "count_ticks", "duration_short", "share", "short", "tick_label", "time_step", "tokens_short",
]  # fmt: skip

#: Steps between the ticks of a time axis, in seconds.
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200,
          10800, 21600, 43200, 86400)  # fmt: skip
#: Ticks of a logarithmic time axis, the coarse ones for long ranges.
_LOG_SECONDS = (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 360000)
_FINE_LOG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 3600, 7200,
                     18000, 36000, 86400)  # fmt: skip
#: Bars of a histogram, about.
_BINS = 16


def short(value: Optional[float]) -> Optional[float]:
    """With as many digits as anybody sees."""
    if value is None:
        return None
    kept = fixed(value, 3 if value < 1 else 2 if value < 100 else 1)
    return int(kept) if kept == int(kept) else kept


def tick_label(moment: float, step: float) -> str:
    """A tick of a time axis, as exact as its ``step``; both in seconds."""
    decimals = max(-math.floor(math.log10(step) + 1e-9), 0)
    rest = round(moment, decimals)
    told = []
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if rest >= seconds:
            told.append(f"{rest // seconds:.0f} {unit}")
            rest %= seconds
    if round(rest, decimals) or not told:
        told.append(f"{rest:.{decimals}f} s" if rest else "0 s")
    return " ".join(told)


def duration_short(seconds: float) -> str:
    """For labels that have little room: "1.5 min"."""
    for limit, part, unit in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return duration(seconds) if part == 1 else f"{seconds / part:.3g} {unit}"
    return f"{seconds / 86400:.3g} d"


def count(number: Optional[float]) -> str:
    return "–" if number is None else f"{number:,.0f}"


def share(part: Optional[float]) -> str:
    """0 to 1 in per cent."""
    if part is None:
        return "–"
    if 0 < part < 0.01:
        return "< 1 %"
    return "> 99 %" if 0.99 < part < 1 else f"{fixed(100 * part, 0):.0f} %"


def tokens_short(number: float) -> str:
    return f"{number / 1000:g}k" if number >= 1000 else f"{number:g}"


def time_step(length: float, wanted: int = 4) -> float:
    """A round step, in seconds, that gives about so many ticks on ``length`` seconds."""
    least = length / max(wanted, 1)
    return next((step for step in _STEPS if step >= least), math.ceil(least / 86400) * 86400.0)


class LogScale:
    """A logarithmic axis that holds all ``values`` (above 0) with some room.

    Args:
        of_time: whether they are seconds, which have other round numbers.
    """

    def __init__(self, values: Sequence[float], *, of_time: bool) -> None:
        low, high = (min(values), max(values)) if values else (1.0, 10.0)
        if high < 2 * low:  # not blown up beyond what it is
            low, high = low / 1.5, high * 1.5
        margin = (high / low) ** 0.04
        self.low, self.high, self._of_time = low / margin, high * margin, of_time

    def place(self, value: float) -> float:
        """0 at the lower end, 1 at the upper."""
        return min(max(math.log(value / self.low) / math.log(self.high / self.low), 0.0), 1.0) if value > 0 else 0.0

    def ticks(self) -> list[tuple[float, str]]:
        """Round values with their labels."""
        if self._of_time:
            for series in (_FINE_LOG_SECONDS, _LOG_SECONDS):
                within = self._within(series)
                if len(within) <= 7:
                    break
            return [(one, duration_short(one)) for one in within]
        decades = [10.0**power for power in range(9)]
        found: list[float] = []
        for steps in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            found = self._within([step * decade for decade in decades for step in steps])
            if len(found) <= 7:
                break
        return [(one, tokens_short(one)) for one in found]

    def _within(self, values: Sequence[float]) -> list[float]:
        return [value for value in values if self.low <= value <= self.high]


def bins(values: Sequence[float], *, of_time: bool) -> tuple[list[float], bool]:
    """Edges of about 16 bins that hold all values (above 0), and whether they grow by a factor.

    They do where the largest is more than 20 times the smallest; else they are round numbers, of time where it is.
    """
    low, high = min(values), max(values)
    if high > 20 * low > 0:
        factor = (high / low) ** (1 / _BINS)
        return [low * factor**index for index in range(_BINS)] + [high], True
    least = ((high - low) or high or 1.0) / _BINS * 0.999
    step = time_step(least * _BINS, _BINS) if of_time else _round_above(least, (1, 2, 5, 10))
    first, last = math.floor(low / step + 1e-9), max(math.ceil(high / step - 1e-9), math.floor(low / step) + 1)
    return [round(index * step, 9) for index in range(first, last + 1)], False


def count_ticks(most: int) -> list[int]:
    """0, the middle and the upper end of an axis that holds ``most``: whole, round numbers."""
    top = max(int(_round_above(most, (1, 2, 4, 6, 8, 10))), 1)
    return [0, top // 2, top] if top > 1 else [0, 1]


def apart(ticks: Sequence[tuple[float, str]], least: float) -> list[tuple[float, str]]:
    """Those of the ticks (0 to 1, words), in ascending order, that are so far from one another."""
    kept: list[tuple[float, str]] = []
    for at, words in ticks:
        if not kept or at - kept[-1][0] >= least:
            kept.append((at, words))
    return kept


def _round_above(value: float, steps: Sequence[float]) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in steps if step * power >= value)
