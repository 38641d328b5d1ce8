"""Streams that outlive their connections, as llama.cpp keeps them for requests with ``X-Conversation-Id``."""

from __future__ import annotations

import asyncio
import time
from typing import AsyncIterator, Optional

__all__ = ["Stream", "Streams"]

#: Simulated seconds for which a stream is kept when it has ended (llama.cpp's STREAM_SESSION_TTL_SECONDS).
_KEPT = 300.0


class Stream:
    """What one request has streamed.

    Attributes:
        data: the body until now.
        stopped: set when it is to end at once.
        ended_at: by ``time.monotonic``; None while it goes on.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.stopped = asyncio.Event()
        self.ended_at: Optional[float] = None
        self._news = asyncio.Event()

    def write(self, data: bytes) -> None:
        self.data += data
        self._tell()

    def end(self) -> None:
        if self.ended_at is None:
            self.ended_at = time.monotonic()
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def read(self, offset: int) -> AsyncIterator[bytes]:
        """The body from so many bytes on, as it comes, to its end."""
        while True:
            news, portion = self._news, bytes(self.data[offset:])
            if portion:
                offset += len(portion)
                yield portion
            elif self.ended_at is not None:
                return
            else:
                await news.wait()


class Streams:
    """The streams by the names that their clients gave them."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._streams: dict[str, Stream] = {}

    def open(self, name: str) -> Stream:
        """A new stream; one of that name before it is stopped."""
        self.stop(name)
        made = self._streams[name] = Stream()
        return made

    def get(self, name: str) -> Optional[Stream]:
        found = self._streams.get(name)
        if found is not None and found.ended_at is not None:
            if (time.monotonic() - found.ended_at) * self._scale > _KEPT:
                del self._streams[name]
                return None
        return found

    def stop(self, name: str) -> None:
        """Ends and forgets the stream, where there is one."""
        found = self._streams.pop(name, None)
        if found is not None:
            found.stopped.set()
            found.end()

    def clear(self) -> None:
        """What becomes of them when the server dies."""
        self._streams.clear()
