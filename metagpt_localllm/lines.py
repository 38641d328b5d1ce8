"""A view of a call as one line: for a terminal of any width, and for the log. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Sequence

from rich.cells import cell_len, get_character_cell_size

from metagpt_localllm.phases import Phase, View, clock

__all__ = ["Span", "line", "sentence"]


@dataclass(frozen=True)
class Span:
    """A part of a line. ``kind``: who, phase, rest, or "" for what is between them."""

    text: str
    kind: str = ""


def line(view: View, width: int) -> Sequence[Span]:
    """One line of at most ``width`` cells. What a narrow terminal drops first: the attempt, the role, the deadline, the words'
    length, the elapsed time; the name is cut at the end."""
    for spans in _layouts(view):
        if _cells(spans) <= width:
            return spans
    rest = f" · {clock(view.elapsed)}"
    name = view.action or view.who
    room = width - cell_len(view.short) - 2
    if room - cell_len(rest) >= min(cell_len(name), 8):
        return Span(_cut(name, room - cell_len(rest)), "who"), Span("  "), Span(view.short, "phase"), Span(rest, "rest")
    if room >= 4:
        return Span(_cut(name, room), "who"), Span("  "), Span(view.short, "phase")
    return (Span(_cut(view.short, width), "phase"),)


def _layouts(view: View) -> Iterator[Sequence[Span]]:
    action = view.action or view.who
    elapsed = clock(view.elapsed)
    deadline = _deadline(view)
    for who, words, rest in (
        (view.who, view.words, (view.attempt, f"{elapsed} elapsed", deadline)),
        (view.who, view.words, (f"{elapsed} elapsed", deadline)),
        (view.who, view.words, (elapsed, deadline)),
        (action, view.words, (elapsed, deadline)),
        (action, view.words, (elapsed,)),
        (action, view.short, (elapsed,)),
    ):
        yield Span(who, "who"), Span("  "), Span(words, "phase"), *(Span(f" · {part}", "rest") for part in rest if part)


def _deadline(view: View) -> str:
    """The one that comes next; the words of a wait for the server have it already."""
    return f"{view.deadline} in {clock(view.left)}" if view.left is not None and view.phase is not Phase.WAITING else ""


def _cells(spans: Sequence[Span]) -> int:
    return sum(cell_len(span.text) for span in spans)


def _cut(text: str, width: int) -> str:
    """``text`` in at most ``width`` cells, with … for what is missing."""
    if cell_len(text) <= width:
        return text
    kept, used = [], 1
    for character in text:
        used += get_character_cell_size(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept) + "…" if width > 0 else ""


def sentence(view: View) -> str:
    """The same facts for a log, of any length; without who asks, which the log's lines begin with."""
    parts = view.attempt, f"{clock(view.elapsed)} elapsed", _deadline(view)
    return f"{view.words} ({', '.join(filter(None, parts))})"
