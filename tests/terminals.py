"""Terminals for tests: an emulator in this process (pyte), and tmux."""

import contextlib
import io
import os
import pty
import select
import shutil
import struct
import subprocess
import termios
import time
import uuid

import pyte
import pytest
from wcwidth import wcwidth


class _Screen(pyte.HistoryScreen):
    """As terminals do it: a wide character that would be cut by the edge goes to the next row (pyte cuts it)."""

    def draw(self, data):
        for character in data:
            if wcwidth(character) == 2 and self.cursor.x == self.columns - 1:
                self.cursor.x = self.columns
            super().draw(character)


class Terminal:
    """A pty with a pair of streams on it, as CPython makes them for stdout and stderr, and what its screen shows."""

    def __init__(self, columns=40, lines=12):
        self.master, self.slave = pty.openpty()
        attributes = termios.tcgetattr(self.slave)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(self.slave, termios.TCSANOW, attributes)
        self.screen = _Screen(columns, lines, history=10_000, ratio=0.5)
        self.parser = pyte.ByteStream(self.screen)
        self.resize(columns, lines)
        self.out, self.err = (self._stream() for _ in range(2))

    def _stream(self):
        raw = io.FileIO(os.dup(self.slave), "w")
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=True)

    def resize(self, columns, lines):
        termios.tcsetwinsize(self.slave, (lines, columns)) if hasattr(termios, "tcsetwinsize") else _winsize(self.slave, lines, columns)
        self.screen.resize(lines, columns)

    def drain(self):
        """What was written goes to the screen."""
        while select.select([self.master], [], [], 0)[0]:
            self.parser.feed(os.read(self.master, 65536))

    def text(self):
        """The lines of the scrollback and of the screen, without the blank ones at the end."""
        self.drain()
        width = self.screen.columns
        rows = [*self.screen.history.top, *(self.screen.buffer[y] for y in range(self.screen.lines))]
        lines = ["".join(row[x].data for x in range(width)).rstrip() for row in rows]  # pyte's display fails at half a wide one
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def cursor(self):
        """Column and row, the scrollback counted."""
        self.drain()
        return min(self.screen.cursor.x, self.screen.columns), len(self.screen.history.top) + self.screen.cursor.y

    def close(self):
        for stream in (self.out, self.err):
            with contextlib.suppress(OSError):
                stream.close()
        os.close(self.master)
        os.close(self.slave)


def _winsize(fd, lines, columns):
    import fcntl

    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


class Tmux:
    """A command in a window of a tmux server of its own."""

    def __init__(self, command, columns=80, lines=24, **environment):
        self.socket = f"localllm-{uuid.uuid4().hex[:8]}"
        settings = [f"{name}={value}" for name, value in environment.items()]
        self._tmux("-f", "/dev/null", "start-server", ";", "set", "-g", "remain-on-exit", "on", ";", "set", "-g", "history-limit", "20000",
                   ";", "new-session", "-d", "-x", str(columns), "-y", str(lines), "env", *settings, *command)  # fmt: skip

    def _tmux(self, *arguments):
        return subprocess.run(["tmux", "-L", self.socket, *arguments], capture_output=True, text=True, check=True).stdout

    def screen(self):
        return self._tmux("capture-pane", "-p")

    def everything(self):
        """Scrollback and screen; lines that the terminal wrapped are whole."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-").rstrip()

    def resize(self, columns, lines):
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def keys(self, *keys):
        self._tmux("send-keys", *keys)

    def wait_for(self, what, seconds=60):
        """The screen, once ``what`` (a function of it) holds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            shown = self.screen()
            if what(shown):
                return shown
            time.sleep(0.05)
        raise AssertionError(f"never seen; the screen is\n{self.screen()}")

    def ended(self):
        return self._tmux("display", "-p", "#{pane_dead}").strip() == "1"

    def how_it_ended(self):
        return self._tmux("display", "-p", "status #{pane_dead_status}, signal #{pane_dead_signal}").strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(["tmux", "-L", self.socket, "kill-server"], capture_output=True)


needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
