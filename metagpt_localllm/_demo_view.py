"""What the demo shows while MetaGPT runs in a process of its own: that process's calls, from the events it writes down.

All times are those of the simulated machine, as in the table at the end: so many times longer than they are here.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Callable, Iterator

from rich.console import Console

from metagpt_localllm import events
from metagpt_localllm.phases import Board, View
from metagpt_localllm.progress import LiveRows, LogLines, Shower, can_draw
from metagpt_localllm.tiers import Caller

__all__ = ["DemoView", "event_of"]

#: Seconds of the simulated machine between two lines about a call, where there is no terminal.
_EVERY = 300.0
#: Seconds, of this machine, until an event is read.
_LATE = 0.2
_SECONDS = ("expected", "first_token", "stall", "total", "progress", "remaining", "silence", "limit", "delay", "usual")
_KINDS = {kind.__name__: kind for kind in events.KINDS}


def event_of(line: dict[str, Any], scale: float) -> events.Event:
    """An event as ``_demo_child`` has written it, its times multiplied by ``scale``."""
    kind: Any = _KINDS[line["event"]]
    values = {name: line[name] for name in (field.name for field in dataclasses.fields(kind)) if name in line}
    call = dict(values["call"])
    values["call"] = events.CallInfo(call["number"], call["model"], Caller(**call["caller"]), call["tier"])
    for name in _SECONDS:
        if values.get(name) is not None:
            values[name] *= scale
    event: events.Event = kind(**values)
    return event


class DemoView:
    """Rows on a terminal, else lines.

    Args:
        console: for the lines.
        path: of the events.
        scale: how many times faster than real the machine is.
        head: gives the row above the calls.
    """

    def __init__(self, console: Console, path: Path, scale: float, head: Callable[[], str]) -> None:
        self._console, self._path, self._scale = console, path, scale
        self._board = Board(late=_LATE * scale)
        self._read = 0  # bytes of the file
        live = console.is_terminal and can_draw(forced=True)
        self._shower: Shower = LiveRows(head=head) if live else LogLines(self._say, _EVERY, self._clock, frozenset())

    def update(self) -> None:
        """Shows what has happened since the last time."""
        for line in self._lines():
            event, at = event_of(line, self._scale), line["at"] * self._scale
            if self._board.take(event, at):
                view = self._board.view(event.call.number, at)
                if view is not None:
                    self._shower.changed(view)
        self._shower.update(self._board.views(self._clock()))

    def end(self) -> None:
        self._shower.end()

    def _clock(self) -> float:
        return time.monotonic() * self._scale

    def _say(self, view: View, text: str) -> None:
        self._console.print(f"{view.who}: {text}", markup=False, highlight=False, soft_wrap=True)

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return
        self._read += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            yield json.loads(line)

