"""A stream of a chat, in any portions: sse.py and answer.py as attempt.py uses them, and unpacking.py before them."""

from __future__ import annotations

import json
import struct

from fuzz.invariants import REQUEST, fits_a_line, is_a_count
from metagpt_localllm.answer import Answer, OddChunk, chunk_of
from metagpt_localllm.failures import from_error_body
from metagpt_localllm.servers import KINDS
from metagpt_localllm.sse import EventTooLarge, SSEDecoder
from metagpt_localllm.unpacking import PIECE, CannotUnpack, Unpacker

SERVERS = [kind() for kind in KINDS]


def check(data: bytes) -> None:
    """The first byte chooses the packing, the second the size of the portions; the rest is the body."""
    how, size, body = (*data[:2], data[2:]) if len(data) > 2 else (0, 0, data)
    encoding = ("", "gzip", "deflate", "br")[how & 3] if how < 64 else ""
    decoder = SSEDecoder()
    answer = Answer.begun("the beginning of an answer, which may come again", 9) if how & 4 else Answer()
    try:
        unpacker = Unpacker(encoding)
        for start in range(0, len(body), max(size, 1) if size < 128 else 65536):
            portion = body[start : start + (max(size, 1) if size < 128 else 65536)]
            for piece in unpacker.pieces(portion):
                assert len(piece) <= PIECE
                for event in decoder.feed(piece):
                    _take(answer, event)
        for event in decoder.close():
            _take(answer, event)
    except (OddChunk, EventTooLarge, CannotUnpack) as error:
        fits_a_line(str(error))
    _look(answer)
    for server in SERVERS:
        progress = server.progress_of_comment(decoder.comment)
        assert progress is None or is_a_count(progress.processed)


def _take(answer: Answer, event: bytes) -> None:
    chunk = chunk_of(event)
    if chunk is None:
        return
    if chunk.get("error"):
        fits_a_line(from_error_body(chunk, REQUEST, "sk-0123456789").what)
        return
    token, text = answer.add(chunk)
    assert isinstance(text, str) and isinstance(token, bool)
    for server in SERVERS:
        progress = server.progress(chunk)
        assert progress is None or is_a_count(progress.processed)


def _look(answer: Answer) -> None:
    usage = answer.completion_usage(1, 1)
    assert is_a_count(usage.prompt_tokens) and is_a_count(usage.completion_tokens)
    answer.completion("m", usage)
    assert 0 <= answer.partial_tokens <= max(answer.tokens, 0)
    assert isinstance(answer.continuable, bool)
    for server in SERVERS:
        server.timings({"usage": answer.usage, "timings": answer.timings})
    record = json.loads(json.dumps(answer.as_record(), allow_nan=False))
    assert Answer.of_record(record).content == answer.content


def _stream(*chunks: object) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def _delta(**delta: object) -> dict:
    return {"id": "x", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def seeds() -> list[bytes]:
    """Where coverage begins."""
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "timings": {"prompt_ms": 1.5, "cache_n": 3},
           "usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}}  # fmt: skip
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    bodies = [
        _stream(_delta(role="assistant", content="")) + _stream(_delta(content="fine"), end) + b"data: [DONE]\n\n",
        _stream(_delta(tool_calls=[call]), _delta(tool_calls=[{**call, "id": "b"}]), end),
        _stream(_delta(reasoning_content="hm"), _delta(reasoning="hm", content=[{"text": "a"}]), end),
        _stream({"error": {"code": 400, "message": "exceed_context_size_error n_ctx: 99", "type": "x"}}),
        _stream({"choices": [], "prompt_progress": {"processed": 3, "total": 9, "cache": 1}}, end),
        b": keepalive 3/9\r\n\r\nevent: x\r\ndata: {\r\ndata: }\r\n\r\n" + _stream("text", 17, None, [[]]),
        _stream(_delta(content="the beginning of an answer, which may come again and goes on"), end),
        b"\xef\xbb\xbfdata: " + b"[" * 2000 + b"\n\n", b'data: {"choices": {"0": 1}}\n\n', b'data: {"id": "\\ud800\xff\x00", "usage": NaN}\n\n',
    ]  # fmt: skip
    import gzip
    import zlib

    packed = [struct.pack("BB", 1, 9) + gzip.compress(bodies[0]), struct.pack("BB", 2, 9) + zlib.compress(bodies[0])]
    return [struct.pack("BB", how, size) + body for body in bodies for how, size in ((64, 255), (4, 7))] + packed
