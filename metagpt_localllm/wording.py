"""How numbers are written for people, in the log, on the terminal and in the report. Pure.

:mod:`metagpt_localllm.phases` has a clock of its own for the live lines, where a figure must not change its width each second.
"""

from __future__ import annotations

import math
from typing import Optional

__all__ = ["counted", "duration", "fixed", "is_printable", "printable", "rate"]

#: Zero-width non-joiner and joiner: Python calls them not printable, and Persian, Hindi and emoji are misspelt without them.
_JOINERS = "\u200c\u200d"

#: From a minute on: the two units, seconds in the smaller one, how many of it are a larger one, and of that how many are too many.
_UNITS = (("min", "s", 1, 60, 60), ("h", "min", 60, 60, 24), ("d", "h", 3600, 24, math.inf))


def counted(number: int, one: str, many: str = "") -> str:
    """Such as "1 call" and "2,000 calls"; ``many`` where that is not ``one`` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def is_printable(letter: str) -> bool:
    """Whether this one character is part of a text, and no command to a terminal."""
    return letter.isprintable() or letter in _JOINERS


def printable(text: str) -> str:
    """With a blank for what a terminal would take for a command, or cannot show."""
    return "".join(letter if is_printable(letter) else " " for letter in text)


def fixed(value: float, decimals: int) -> float:
    """Rounded, a half upwards: Python and JavaScript have other ways, each of its own."""
    return math.floor(value * 10.0**decimals + 0.5) / 10.0**decimals


def duration(seconds: Optional[float]) -> str:
    """Such as "35 ms", "4.2 s", "3 min 20 s", "2 h 5 min"; a dash where it is not known. page.js does the same."""
    if seconds is None:
        return "–"
    if seconds == 0:
        return "0 s"
    if seconds < 0.0995:
        return f"{max(fixed(seconds * 1000, 0), 1):.0f} ms"
    if seconds < 9.95:
        return f"{fixed(seconds, 2 if seconds < 0.995 else 1):g} s"
    if seconds < 59.5:
        return f"{fixed(seconds, 0):.0f} s"
    told = ""
    for large, small, part, size, limit in _UNITS:
        whole, rest = divmod(int(fixed(seconds / part, 0)), size)
        told = f"{whole:,} {large}" + (f" {rest} {small}" if rest else "")
        if whole < limit:
            break
    return told


def rate(number: Optional[float]) -> str:
    """Tokens per second, three digits."""
    if number is None:
        return "–"
    decimals = 0 if number >= 99.95 else 1 if number >= 9.95 else 2
    return f"{fixed(number, decimals):,.{decimals}f}"
