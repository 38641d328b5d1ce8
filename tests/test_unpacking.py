"""Bodies that are packed although nobody asked for it, and bodies without an end: read in small pieces and within bounds."""

import asyncio
import gzip
import tracemalloc
import zlib

import pytest
from conftest import RawServer, chunk
from hypothesis import given
from hypothesis import strategies as st

from metagpt_localllm import errors
from metagpt_localllm.call import complete
from metagpt_localllm.checking import Trouble, see
from metagpt_localllm.servers.base import Ask, Unanswered
from metagpt_localllm.transport import Endpoint
from metagpt_localllm.unpacking import PIECE, CannotUnpack, UnknownPacking, Unpacker

WHOLE = chunk("fine") + chunk(finish="stop")
MB = 1 << 20
HEAD = b"HTTP/1.1 %d X\r\ncontent-type: %s\r\nconnection: close\r\n%s\r\n"
STREAM, JSON = b"text/event-stream", b"application/json"


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "Deflate": raw_deflate, "identity": bytes,
           "": bytes, "UTF-8": bytes, "none": bytes, "gzip, aws-chunked": gzip.compress, "gzip, identity": gzip.compress}  # fmt: skip


@pytest.mark.parametrize("encoding", PACKERS)
@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(0, 450), max_size=5), times=st.integers(1, 3))
def test_what_was_packed_comes_out_however_it_is_cut(encoding, data, cuts, times):
    packed = PACKERS[encoding](data) + (gzip.compress(data) * (times - 1) if encoding == "gzip" else b"")
    edges = [0, *sorted(min(cut, len(packed)) for cut in cuts), len(packed)]
    unpacker = Unpacker(encoding)
    out = b"".join(b"".join(unpacker.pieces(packed[start:end])) for start, end in zip(edges, edges[1:]))
    assert out == data * (times if encoding == "gzip" else 1)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_pieces_are_small_whatever_they_are_made_of(encoding):
    packed = PACKERS[encoding](bytes(20 * MB))
    tracemalloc.start()
    try:
        sizes = [len(piece) for piece in Unpacker(encoding).pieces(packed)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) == 20 * MB and max(sizes) <= PIECE
    assert peak < MB


def test_members_of_exactly_a_piece_have_an_end():
    packed = gzip.compress(bytes(PIECE)) * 3
    assert [len(piece) for piece in Unpacker("gzip").pieces(packed)] == [PIECE] * 3


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "deflate,gzip", "gzip\x00", "x" * 9999])
def test_what_is_not_known_is_refused_in_a_short_line(encoding):
    with pytest.raises(UnknownPacking) as caught:
        Unpacker(encoding)
    assert len(str(caught.value)) < 150 and str(caught.value).isprintable()


@given(st.binary(min_size=2, max_size=100), st.sampled_from(["gzip", "deflate"]))
def test_damaged_bytes_are_a_decoding_error_or_nothing(data, encoding):
    try:
        assert sum(map(len, Unpacker(encoding).pieces(data))) <= 2000 * len(data)
    except CannotUnpack as error:
        assert "cannot be unpacked" in str(error)


@pytest.mark.parametrize("encoding, packed", [("gzip", gzip.compress(WHOLE)), ("deflate", raw_deflate(WHOLE))])
async def test_a_packed_stream_is_read(ask, encoding, packed):
    async with RawServer(HEAD % (200, STREAM, b"content-encoding: %s\r\n" % encoding.encode()) + packed) as server:
        assert (await complete(ask(server))).text == "fine"


@pytest.mark.parametrize("status, kind", [(200, STREAM), (200, JSON), (500, JSON)], ids=["stream", "whole", "error"])
async def test_a_bomb_in_a_chat_is_not_unpacked_to_its_end(ask, status, kind):
    packed = gzip.compress(b": " + bytes(200 * MB), 1)
    bomb = HEAD % (status, kind, b"content-encoding: gzip\r\n") + packed
    async with RawServer(bomb, WHOLE) as server:
        await asyncio.wait_for(complete(ask(server)), 20)  # what is imported late counts for nothing
        server.requests.clear()
        tracemalloc.start()
        try:
            outcome = await complete(ask(server))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert outcome.text == "fine" and len(server.requests) == 2
    assert peak < 70 * MB


async def test_a_packing_that_nobody_asked_for_is_named_and_not_tried_again(ask):
    async with RawServer(HEAD % (200, STREAM, b"content-encoding: br\r\n") + b"\x0b\x02\x80") as server:
        with pytest.raises(errors.ServerFailed, match="packed as 'br'.*Switch compression off"):
            await complete(ask(server))
    assert len(server.requests) == 1


async def test_an_error_that_is_packed_oddly_still_has_its_status(ask):
    async with RawServer(HEAD % (401, JSON, b"content-encoding: zstd\r\n") + b"(\xb5/\xfd") as server:
        with pytest.raises(errors.AccessDenied, match="answered 401"):
            await complete(ask(server))


class Endless(RawServer):
    """Answers every question without an end, and counts what it could send."""

    def __init__(self, head, portion, **options):
        super().__init__(WHOLE, **options)
        self.head, self.portion, self.sent = head, portion, 0

    async def _about(self, writer, path):
        writer.write(self.head)
        while True:
            writer.write(self.portion)
            await writer.drain()
            self.sent += len(self.portion)


@pytest.mark.parametrize("status", [200, 401, 404, 503])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
async def test_an_answer_to_a_question_that_does_not_end_is_not_read_to_its_end(status, packed):
    portion = gzip.compress(b" " * MB, 9) if packed else b" " * 65536
    head = HEAD % (status, JSON, b"content-encoding: gzip\r\n" if packed else b"")
    async with Endless(head, portion) as server:
        ask = Ask(Endpoint(server.base_url, "m"))
        try:
            answer = await asyncio.wait_for(ask.models(), 20)
            assert answer is None and status == 404
        except Unanswered as error:
            assert {200: "over 16,777,216 bytes", 401: "over"}.get(status, str(status)) in str(error)
        assert await asyncio.wait_for(ask.status("/health"), 20) == status
        await asyncio.sleep(0.1)
        assert server.sent < 40 * MB


async def test_a_call_and_a_check_get_over_a_server_whose_list_does_not_end(ask):
    async with Endless(HEAD % (200, JSON, b""), b'{"data": [' + b" " * 65536) as server:
        assert (await asyncio.wait_for(complete(ask(server)), 20)).text == "fine"
        found = await see(Endpoint(server.base_url, "m"))
    assert found.trouble is Trouble.NO_MODEL_SERVER and "over 16,777,216 bytes" in found.sentence("llm")


async def test_a_list_nested_without_end_is_no_list(ask):
    body = HEAD % (200, JSON, b"") + b'{"data":' + b"[" * 100_000
    async with RawServer(WHOLE, about={"/v1/models": body}) as server:
        assert await Ask(Endpoint(server.base_url, "m")).models() is None
        assert (await see(Endpoint(server.base_url, "m"))).trouble is Trouble.NO_MODEL_SERVER
