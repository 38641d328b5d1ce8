"""The body of a response in small pieces, unpacked where it is packed, and within bounds.

We ask for bodies that are not packed (``accept-encoding: identity``), but some proxies pack them all the same. httpx unpacks
each portion at once: 64 KiB may become 64 MiB, and packed twice 64 GiB.
"""

from __future__ import annotations

import zlib
from typing import Any, AsyncIterator, Iterator

import anyio.lowlevel
import httpx

__all__ = ["PIECE", "BodyTooLarge", "CannotUnpack", "UnknownPacking", "Unpacker", "error_text", "pieces", "read_body"]

#: Bytes of a piece at the most.
PIECE = 1 << 16
#: Pieces of one portion after which other tasks, and deadlines, get their turn.
_TURN = 16
#: Words that servers write where they mean that nothing is packed: httpx itself passes over them.
_NOT_PACKED = frozenset({"", "identity", "none", "utf-8", "utf8", "binary", "chunked", "aws-chunked"})
#: Bytes of an error's body that are read.
_ERROR = 1 << 20


class CannotUnpack(httpx.DecodingError):
    """What the server has packed is damaged."""


class UnknownPacking(CannotUnpack):
    """The body is packed in a way that was not asked for and is not known here: br, zstd, or twice."""


class BodyTooLarge(ValueError):
    """The body is over what is read of it.

    Attributes:
        beginning: what was read.
    """

    def __init__(self, beginning: bytes) -> None:
        super().__init__(f"the answer is over {len(beginning):,} bytes")
        self.beginning = beginning


class Unpacker:
    """Unpacks one body. Pure.

    Args:
        encoding: its ``content-encoding``; "", "identity" or a word that is none, such as "utf-8", where it is not packed.

    Raises:
        UnknownPacking: neither of these, nor gzip or deflate.
    """

    def __init__(self, encoding: str) -> None:
        names = [name for name in encoding.lower().replace(" ", "").split(",") if name not in _NOT_PACKED]
        if len(names) > 1 or not set(names) <= {"gzip", "x-gzip", "deflate"}:
            raise UnknownPacking(f"the answer is packed as {encoding[:40]!r}, which was not asked for")
        self._how = names[0].replace("x-", "") if names else ""
        self._begun = b""  # of deflate, until it tells by its first two bytes whether it has zlib's header; some have none
        self._zlib: Any = zlib.decompressobj(zlib.MAX_WBITS | 16) if self._how == "gzip" else None

    def pieces(self, portion: bytes) -> Iterator[bytes]:
        """What the portion holds, in pieces of at most PIECE bytes.

        Raises:
            CannotUnpack: it is damaged.
        """
        if not self._how:
            for start in range(0, len(portion), PIECE):
                yield portion[start : start + PIECE]
            return
        if self._zlib is None:
            portion = self._begun = self._begun + portion
            if len(portion) < 2:
                return
            with_header = portion[0] & 0x0F == 8 and int.from_bytes(portion[:2], "big") % 31 == 0
            self._zlib = zlib.decompressobj(zlib.MAX_WBITS if with_header else -zlib.MAX_WBITS)
        while portion:
            if self._zlib.eof:  # gzip may have members, one after the other; anything else is no part of the body
                if self._how != "gzip" or portion[:1] != b"\x1f":
                    return
                self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 16)
            yield from self._unpacked(portion)
            portion = self._zlib.unused_data

    def _unpacked(self, portion: bytes) -> Iterator[bytes]:
        piece = b""
        while not self._zlib.eof and (portion or len(piece) == PIECE):
            try:
                piece = self._zlib.decompress(portion, PIECE)
            except zlib.error as error:
                raise CannotUnpack(f"what the server has packed cannot be unpacked ({error})") from None
            portion = self._zlib.unconsumed_tail
            if piece:
                yield piece


async def pieces(response: httpx.Response) -> AsyncIterator[bytes]:
    """The body of a streamed response as it comes, in pieces of at most PIECE bytes.

    Raises:
        CannotUnpack: it is damaged, or packed in an unknown way.
        httpx.HTTPError: as httpx does.
    """
    unpacker = Unpacker(response.headers.get("content-encoding", ""))
    async for portion in response.aiter_raw():
        for number, piece in enumerate(unpacker.pieces(portion), 1):
            yield piece
            if number % _TURN == 0:
                await anyio.lowlevel.checkpoint()


async def read_body(response: httpx.Response, limit: int) -> bytes:
    """The whole body of a streamed response.

    Raises:
        BodyTooLarge: it has more than ``limit`` bytes; the rest is not read.
        CannotUnpack: as :func:`pieces`.
        httpx.HTTPError: as httpx does.
    """
    body = bytearray()
    async for piece in pieces(response):
        body += piece
        if len(body) > limit:
            raise BodyTooLarge(bytes(body[:limit]))
    return bytes(body)


async def error_text(response: httpx.Response) -> str:
    """The body of an error, as far as it is worth reading; "" where it cannot be unpacked, for its status tells.

    Raises:
        httpx.HTTPError: as httpx does.
    """
    try:
        body = await read_body(response, _ERROR)
    except BodyTooLarge as error:
        body = error.beginning
    except CannotUnpack:
        body = b""
    return body.decode("utf-8", "replace")
