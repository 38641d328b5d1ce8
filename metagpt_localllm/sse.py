"""Server-sent events out of bytes, without I/O (WHATWG HTML, section 9.2.6).

Unlike the decoders of httpx-sse and openai it tells comments: a keep-alive shows that the connection
lives, not that the model works, and mlx-lm's and llama.cpp's pings are only comments.
"""

from __future__ import annotations

from typing import Optional

__all__ = ["MAX_EVENT_BYTES", "EventTooLarge", "SSEDecoder"]

#: One event, or one line, over this many bytes is no token but a fault.
MAX_EVENT_BYTES = 16 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"


class EventTooLarge(ValueError):
    """One event or one line of the stream is over MAX_EVENT_BYTES."""

    def __init__(self) -> None:
        super().__init__(f"an event of the stream is over {MAX_EVENT_BYTES:,} bytes")


class SSEDecoder:
    """Takes bytes in any portions, gives the data of whole events.

    Attributes:
        comments: how many comment lines have come.
        comment: the latest of them, without its colon.
    """

    def __init__(self) -> None:
        self.comments = 0
        self.comment = b""
        self._rest = bytearray()  # of a line that has not ended; grows in place, for portions may be single bytes
        self._data: list[bytes] = []
        self._size = 0  # of _data
        self._began = False

    def feed(self, portion: bytes) -> list[bytes]:
        """The data of the events that ``portion`` completes.

        Raises:
            EventTooLarge: an event or a line does not end.
        """
        *lines, rest = portion.split(b"\n")
        if lines and self._rest:
            lines[0] = bytes(self._rest) + lines[0]
            self._rest.clear()
        self._rest += rest
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EventTooLarge
        events: list[bytes] = []
        for line in lines:
            event = self._line(line[:-1] if line.endswith(b"\r") else line)
            if event is not None:
                events.append(event)
        return events

    def close(self) -> list[bytes]:
        """The event left open at the end of the stream: some servers end without the blank line."""
        return self.feed(b"\n\n") if self._rest or self._data else []

    def _line(self, line: bytes) -> Optional[bytes]:
        if not self._began:
            self._began = True
            line = line[len(_BOM) :] if line.startswith(_BOM) else line
        if not line:
            if not self._data:
                return None
            data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
            self._data, self._size = [], 0
            return data or None  # an event without data is none (WHATWG): some gateways ping with it
        if line.startswith(b"data:"):
            data = line[6:] if line[5:6] == b" " else line[5:]
            self._size += len(data) + 1
            if self._size > MAX_EVENT_BYTES:
                raise EventTooLarge
            self._data.append(data)
        elif line.startswith(b":"):
            self.comments += 1
            self.comment = line[1:]
        return None
