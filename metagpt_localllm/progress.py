"""What is shown while calls run: rows on a terminal, an output in a notebook, or lines in the log; ``llm.local.progress`` says which.

Events come in on the loops of the calls, of which there may be several in threads; one thread of ours draws and logs
by the clock, and sleeps while no call runs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import Any, Callable, Optional, Protocol, Sequence

from metagpt_localllm import events
from metagpt_localllm.events import Event
from metagpt_localllm.lines import sentence
from metagpt_localllm.live import Rows, terminal_streams
from metagpt_localllm.notebook import Output, in_notebook
from metagpt_localllm.phases import Board, Phase, View
from metagpt_localllm.rows import Painter
from metagpt_localllm.settings import ProgressSettings
from metagpt_localllm.telling import name_of
from metagpt_localllm.tiers import Caller

__all__ = ["LiveRows", "LogLines", "Progress", "can_draw", "hide", "show"]

#: Seconds between two drawings while nothing but the time goes on.
_TICK = 0.25
#: Seconds from a change to its drawing.
_PAUSE = 0.05
#: Seconds between two lines of the log in scaled time, at the least.
_LEAST_EVERY = 2.0
#: Phases that :mod:`metagpt_localllm.telling` has a line for when they begin.
_TOLD = frozenset({Phase.QUEUED, Phase.LOADING, Phase.RETRY, Phase.WAITING})
#: Set by continuous integration, whose logs keep every drawing.
_CI = ("CI", "GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "TEAMCITY_VERSION", "JENKINS_URL", "TF_BUILD")

_log = logging.getLogger(__name__)


class Shower(Protocol):
    """A way of showing. ``tick``: seconds between two calls of :meth:`update` by the clock."""

    tick: float

    def changed(self, view: View) -> None:
        """A call has entered this phase. Runs on the call's own loop."""

    def update(self, views: Sequence[View]) -> None:
        """These calls run now."""

    def end(self) -> None:
        """No call runs any more."""


class LiveRows:
    """On a terminal.

    Raises:
        OSError, AttributeError: nothing can be drawn there.
    """

    tick = _TICK

    def __init__(self, *, head: Optional[Callable[[], str]] = None) -> None:
        streams = terminal_streams()
        if not streams:
            raise OSError("no terminal")
        self._rows = Rows(streams)
        self._painter = Painter(streams[0])
        self._head = head

    def changed(self, view: View) -> None:
        """The next update shows it."""

    def update(self, views: Sequence[View]) -> None:
        size = self._rows.size
        head = (self._head(),) if self._head is not None else ()
        self._rows.show(self._painter.paint(views, size.columns, size.lines, head))

    def end(self) -> None:
        self._rows.close()

    def abandon(self) -> None:
        """In a child process, which has no part in this."""
        self._rows.abandon()


class LogLines:
    """In the log: a line when a phase begins, and every so often while it lasts.

    Args:
        say: gets a call and what is to be said of it.
        every: seconds.
        clock: seconds, that of the views' times.
        told: phases whose beginning somebody else tells of; what the log has anyway unless given.
    """

    def __init__(
        self, say: Callable[[View, str], None], every: float, clock: Callable[[], float] = time.monotonic,
        told: frozenset[Phase] = _TOLD,
    ) -> None:  # fmt: skip
        self._say, self._every, self._clock, self._told = say, every, clock, told
        self._due: dict[int, float] = {}
        self.tick = min(1.0, every / 4)

    def changed(self, view: View) -> None:
        self._due[view.number] = self._clock() + self._every
        if view.phase not in self._told:
            self._say(view, sentence(view))

    def update(self, views: Sequence[View]) -> None:
        now = self._clock()
        for view in views:
            if now >= self._due.setdefault(view.number, now + self._every):
                self._due[view.number] = now + self._every
                self._say(view, sentence(view))

    def end(self) -> None:
        self._due.clear()


class Progress:
    """Follows all calls of the process and shows them.

    Args:
        choose: gives a way of showing, each time that the first of several calls begins; None for none.
        clock: seconds; only goes forward.
    """

    def __init__(self, choose: Callable[[], Optional[Shower]], clock: Callable[[], float] = time.monotonic) -> None:
        self._choose, self._clock = choose, clock
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._guard = threading.RLock()
        self._wake = threading.Event()
        self._board = Board()
        self._shower: Optional[Shower] = None
        self._ended = False
        self._thread: Optional[threading.Thread] = None

    def take(self, event: Event) -> None:
        """A subscriber of :mod:`metagpt_localllm.events`."""
        now, view = self._clock(), None
        if type(event) is events.Token and not self._board.take(event, now):
            return  # nearly all of them, without a lock
        with self._guard:
            if type(event) is not events.Token and not self._board.take(event, now):
                return
            if len(self._board) == 0:
                self._end()
                return
            if self._shower is None and not self._ended:
                self._shower = self._choose()
            shower = self._shower
            if shower is not None:
                view = self._board.view(event.call.number, now)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._tick, name="metagpt-localllm-progress", daemon=True)
                    self._thread.start()
        if shower is not None and view is not None:
            shower.changed(view)
        self._wake.set()

    def forget(self) -> None:
        """In a child process: the calls are the parent's, and so is the terminal."""
        if isinstance(self._shower, LiveRows):
            self._shower.abandon()
        self._begin_anew()

    def end(self) -> None:
        """Nothing is shown any more."""
        with self._guard:
            self._end()
            self._ended = True
        self._wake.set()

    def _end(self) -> None:
        shower, self._shower = self._shower, None
        if shower is not None:
            shower.end()

    def _tick(self) -> None:
        while not self._ended:
            shower = self._shower
            if self._wake.wait(shower.tick if shower is not None else None):
                time.sleep(_PAUSE)  # what ends sooner is not worth a drawing
            self._wake.clear()
            try:
                with self._guard:  # not while it ends
                    shower = self._shower
                    views = self._board.views(self._clock()) if shower is not None else []
                    if shower is not None and not isinstance(shower, LogLines):
                        shower.update(views)
                if isinstance(shower, LogLines):  # loguru has locks of its own
                    shower.update(views)
            except Exception:
                _log.debug("the calls could not be shown", exc_info=True)


_progress: Optional[Progress] = None
_decided = False
_is_child = False
_unsubscribe: Optional[Callable[[], None]] = None


def show(settings: ProgressSettings, logger: Any) -> None:
    """Shows all calls of this process from now on as the settings say. The first one wins; later ones change nothing.

    Args:
        logger: MetaGPT's (loguru's).
    """
    global _progress, _decided, _unsubscribe
    if _decided:
        return
    _decided = True
    if settings.mode == "off":
        return
    from metagpt_localllm.run import time_scale  # not for the demo, which does without MetaGPT

    mode = settings.mode

    def say(view: View, text: str) -> None:
        who = name_of(view.number, Caller(view.action, view.role))
        (logger.warning if view.phase is Phase.STALLED else logger.info)(f"{who}: {text}")

    def choose() -> Optional[Shower]:
        if mode != "log" and not _is_child:
            try:
                if in_notebook():
                    return Output()
                if can_draw(forced=mode == "live"):
                    return LiveRows()
            except (OSError, AttributeError, ValueError):
                _log.debug("nothing can be drawn here", exc_info=True)
        return LogLines(say, max(settings.every / time_scale(), min(settings.every, _LEAST_EVERY)))

    _progress = Progress(choose)
    _unsubscribe = events.subscribe(_progress.take, *events.KINDS)


def hide() -> None:
    """Ends what :func:`show` began; after that it may begin in another way. Idempotent."""
    global _progress, _decided, _unsubscribe
    _decided = False
    if _progress is not None and _unsubscribe is not None:
        _unsubscribe()
        _progress.end()
        _progress = _unsubscribe = None


def _in_child() -> None:
    """The terminal is the parent's, which may draw there."""
    global _is_child
    _is_child = True
    if _progress is not None:
        _progress.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def can_draw(*, forced: bool = False) -> bool:
    """Whether there is a terminal that rows can be drawn on. ``forced``: also under continuous integration."""
    if os.environ.get("TERM", "").lower() in ("dumb", "unknown") or not terminal_streams():
        return False
    if sys.platform == "win32":
        from rich.console import Console

        if Console(file=sys.stderr).legacy_windows:
            return False
    return forced or not any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in _CI)
