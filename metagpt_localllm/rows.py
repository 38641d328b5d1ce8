"""Views as rows for a terminal or a notebook: which there is room for, and in which colours."""

from __future__ import annotations

from typing import Sequence, TextIO

from rich.console import Console
from rich.text import Text

from metagpt_localllm.lines import line
from metagpt_localllm.phases import Phase, View

__all__ = ["Painter", "texts"]

_WHO, _REST = "bold", "dim"
_STYLES = {
    Phase.QUEUED: "dim",
    Phase.LOADING: "cyan",
    Phase.PREFILL: "cyan",
    Phase.GENERATING: "green",
    Phase.STALLED: "yellow",
    Phase.RETRY: "yellow",
    Phase.WAITING: "red",
}
#: Rows of calls at the most, and the share of the terminal's.
_MOST, _SHARE = 8, 1 / 3


def texts(views: Sequence[View], width: int, room: int = _MOST) -> Sequence[Text]:
    """One row per call, of at most ``width`` cells; where there are more than ``room``, the last says how many."""
    shown = views if len(views) <= room else views[: max(room - 1, 0)]
    rows = [_text(view, width) for view in shown]
    if len(shown) < len(views):
        rows.append(_plain(f"and {len(views) - len(shown)} more" if shown else f"{len(views)} calls run", width))
    return rows


def _text(view: View, width: int) -> Text:
    styles = {"who": _WHO, "phase": _STYLES[view.phase], "rest": _REST}
    return Text.assemble(*((span.text, styles.get(span.kind, "")) for span in line(view, width)))


def _plain(text: str, width: int) -> Text:
    row = Text(text, style=_REST)
    row.truncate(width, overflow="ellipsis")
    return row


class Painter:
    """Rows for one terminal, in the colours that it has (none where NO_COLOR is set)."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, force_terminal=True, legacy_windows=False)

    def paint(self, views: Sequence[View], columns: int, lines: int, head: Sequence[str]) -> Sequence[str]:
        """What is written to the terminal, a string for each row. ``head``: rows above the calls."""
        width = max(columns - 1, 1)  # the last column is where terminals differ
        room = max(min(_MOST, int((lines - 1) * _SHARE)), 1)
        return [self._ansi(row) for row in (*(_plain(text, width) for text in head), *texts(views, width, room))]

    def _ansi(self, row: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(row, end="", soft_wrap=True, highlight=False)
        return captured.get()
