"""Rows below a program's own output on a terminal, which leave that output as it would be without them.

The cursor stays where the program left it. To draw, the rows below are made sure of (IND, which scrolls at the bottom and
keeps the column), the cursor is saved (DECSC), the rows are written, and it is restored (DECRC, colours included): so nothing
hangs on knowing the column, and text that a program or its children write past us costs no more than a row of ours. Before
output that leaves the cursor's row, the rows are erased, and drawn again after it. It works on partial lines, which
``rich.live`` does not, and through references to ``sys.stdout`` and ``sys.stderr`` that were taken before (loguru's): the
``write`` and ``flush`` of these very objects are replaced for as long as there are rows.

What a stream still holds back (MetaGPT's tokens until the line ends) is not flushed: the order of what stdout and stderr show
is that of a run without us.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import threading
import time
from typing import Any, Iterator, Sequence, TextIO

from metagpt_localllm.cursor import Cursor

__all__ = ["Rows", "terminal_streams"]

#: Seconds between two drawings at the least; a flood of lines goes by without them.
_THROTTLE = 0.01
#: Bytes without a newline that a stream may hold back (CPython's TextIOWrapper: 8,192) before we flush it.
_MOST_HELD = 8000
_DOWN, _SAVE, _RESTORE, _ERASE = "\x1bD", "\x1b7", "\x1b8", "\x1b[J"
#: Erases from the next row on, which is made sure of.
_ERASE_BELOW = f"{_DOWN}\x1b[A{_SAVE}\x1b[B\r{_ERASE}{_RESTORE}"
#: Terminals wrap what is wider than we think; not while we draw.
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"


def terminal_streams() -> Sequence[TextIO]:
    """The streams of this process that show on one terminal, those it began with included; none where there is no terminal."""
    found: list[tuple[int, TextIO]] = []
    for stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__):
        if stream is None or any(stream is other for _, other in found):
            continue
        with contextlib.suppress(Exception):  # a replaced stream may be anything
            if stream.isatty():
                found.append((os.fstat(stream.fileno()).st_rdev, stream))
    return [stream for terminal, stream in found if terminal == found[0][0]]


class Rows:
    """Rows below what a program writes.

    Safe for several threads. Nothing is drawn before :meth:`show`.

    Args:
        streams: all those that write to the terminal; the rows go to the first.

    Raises:
        OSError: the first is no terminal.
        AttributeError: a stream's methods cannot be replaced.
    """

    def __init__(self, streams: Sequence[TextIO]) -> None:
        self._fd = streams[0].fileno()
        self._encoding = getattr(streams[0], "encoding", None) or "utf-8"
        self._lock = threading.RLock()
        self._size = os.get_terminal_size(self._fd)
        self._cursor = Cursor(self._size.columns)
        self._rows: Sequence[str] = ()
        self._shown = 0  # rows that are on the screen
        self._drawn_at = 0.0
        self._open = True
        self._taps: list[_Tap] = []
        atexit.register(self.close)
        try:
            for stream in streams:
                self._taps.append(_Tap(self, stream))
        except BaseException:  # a stream that cannot be tapped
            self.abandon()
            raise

    @property
    def size(self) -> os.terminal_size:
        """Columns and lines of the terminal."""
        return self._size

    def show(self, rows: Sequence[str]) -> None:
        """Draws these rows, which may have colours (SGR) and are narrower than the terminal, in place of those before."""
        with self._lock:
            if self._open:
                self._measure()
                self._rows = rows[: max(self._size.lines - 2, 0)]
                self._draw()

    def close(self) -> None:
        """Erases the rows and gives the streams back. Idempotent."""
        with self._lock:
            if self._open:
                self._erase()
                self.abandon()

    def abandon(self) -> None:
        """Gives the streams back and writes nothing: in a child process, or to a terminal that is gone."""
        self._open, self._shown, self._rows = False, 0, ()
        for tap in self._taps:
            tap.remove()
        atexit.unregister(self.close)

    # ------------------------------------------------------------------ for the streams

    def stays(self, text: str) -> bool:
        """Whether ``text`` may go to the terminal without further ado, since the rows stay as they are; it is then taken to go."""
        if self._shown and self._cursor.fits(text):
            self._cursor.feed(text)
            return True
        return False

    @contextlib.contextmanager
    def around(self, text: str) -> Iterator[None]:
        """The program's ``text`` goes to the terminal within, and leaves the cursor's row."""
        self._measure()
        self._erase()
        yield
        self._cursor.feed(text)
        if time.monotonic() - self._drawn_at >= _THROTTLE:
            self._draw()

    def _measure(self) -> None:
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(self._fd)
            if size != self._size:
                self._size = size
                self._cursor.resize(size.columns)

    def _erasure(self) -> str:
        """What erases the rows that are shown. Where nothing stands to the right of the cursor, all from it on may go."""
        return "" if not self._shown else _ERASE if self._cursor.column >= self._cursor.extent else _ERASE_BELOW

    def _erase(self) -> None:
        if self._shown:
            erasure, self._shown = self._erasure(), 0
            self._put(erasure)

    def _draw(self) -> None:
        rows = self._rows
        if not rows:
            self._erase()
        elif self._cursor.drawable and _in_foreground(self._fd):
            erasure, count = self._erasure(), len(rows)
            drawn = "".join(f"\x1b[B\r\x1b[2K{row}\x1b[0m" for row in rows)
            self._shown = count
            self._put(f"{erasure}{_DOWN * count}\x1b[{count}A{_SAVE}{_NO_WRAP}\x1b[0m{drawn}{_WRAP}{_RESTORE}")
            self._drawn_at = time.monotonic()

    def _put(self, text: str) -> None:
        data = text.encode(self._encoding, "replace")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:  # it is gone, or takes nothing now
            self.abandon()


class _Tap:
    """Stands in the way of one stream's ``write`` and ``flush``."""

    def __init__(self, rows: Rows, stream: TextIO) -> None:
        self._stream: Any = stream
        self._held: list[str] = []  # what the stream has been given and does not show yet
        self._bytes = 0  # of these, at the most
        own = getattr(stream, "__dict__", {})
        self._before = {name: own[name] for name in ("write", "flush") if name in own}
        self._by_line = bool(getattr(stream, "line_buffering", False)) and not getattr(stream, "write_through", False)
        unbuffered = isinstance(getattr(stream, "buffer", None), io.RawIOBase) and getattr(stream, "write_through", False)
        nothing = contextlib.nullcontext()
        lock, original_write, original_flush = rows._lock, stream.write, stream.flush

        def write(text: str, /) -> int:
            with lock:
                if not rows._open or not isinstance(text, str) or not text:
                    return original_write(text)
                line_ends = "\n" in text or "\r" in text
                if self._by_line and not line_ends and self._bytes < _MOST_HELD:
                    count = original_write(text)
                    self._held.append(text)
                    self._bytes += len(text) if text.isascii() else 4 * len(text)
                    return count
                shown = self._taken() + text
                with nothing if not line_ends and rows.stays(shown) else rows.around(shown):
                    count = original_write(text)
                    if not (unbuffered or (self._by_line and line_ends)):
                        original_flush()
                return count

        def flush() -> None:
            with lock:
                if not self._held or not rows._open:
                    return original_flush()
                shown = self._taken()
                with nothing if rows.stays(shown) else rows.around(shown):
                    original_flush()

        self._ours = {"write": write, "flush": flush}
        for name, ours in self._ours.items():
            setattr(self._stream, name, ours)

    def _taken(self) -> str:
        held = "".join(self._held)
        self._held.clear()
        self._bytes = 0
        return held

    def remove(self) -> None:
        for name, ours in self._ours.items():
            if self._stream.__dict__.get(name) is ours:
                if name in self._before:
                    setattr(self._stream, name, self._before[name])
                else:
                    delattr(self._stream, name)


def _in_foreground(fd: int) -> bool:
    """Whether the terminal is this process group's, and not that of a shell that has put it into the background."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except (AttributeError, OSError):
        return True
