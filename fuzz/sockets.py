"""Whole calls over real sockets against a server that answers with the fuzzer's bytes: status line, headers, body and all."""

from __future__ import annotations

import asyncio
import atexit
import gzip
import json
import logging
import shutil
import tempfile
import time
import traceback

from fuzz.invariants import KEY, fits_a_line
from metagpt_localllm import errors, history
from metagpt_localllm.call import Call, complete
from metagpt_localllm.checking import see
from metagpt_localllm.servers import detection
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint

logging.getLogger("asyncio").setLevel(logging.CRITICAL)
_FOLDER = tempfile.mkdtemp(prefix="fuzz-sockets-")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
_SETTINGS = LocalSettings.model_validate(
    {"timeouts": {"connect": 1, "first_token": 0.5, "stall": 0.5, "total": 1}, "retry": {"attempts": 1, "wait_for_server": 0},
     "journal": {"enabled": False, "path": f"{_FOLDER}/state.db"}}
)  # fmt: skip
_MODEL = "m"
#: Seconds that a call may take at the most: its deadlines, twice where it is sent again, and what is asked beside it.
_LONGEST = 20.0


def check(data: bytes) -> None:
    """Answers are apart by 0x1e: the first is the chat's, the others are those of questions in turn. With no status line it is a 200."""
    asyncio.run(_called(data.split(b"\x1e")))


async def _called(answers: list[bytes]) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            chat = b"/chat/completions" in head.split(b"\r\n")[0] and b"input_tokens" not in head
            asked.append(head)
            said = answers[0] if chat or len(answers) == 1 else answers[1 + len(asked) % (len(answers) - 1)]
            if not said.startswith(b"HTTP/"):
                kind = b"text/event-stream" if chat else b"application/json"
                said = b"HTTP/1.1 200 OK\r\ncontent-type: " + kind + b"\r\nconnection: close\r\n\r\n" + said
            writer.write(said)
            await writer.drain()
            writer.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass

    for memory in (detection._servers, detection._learned, detection._strict, history._histories):
        memory.clear()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    endpoint = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", _MODEL, KEY)
    body = {"model": _MODEL, "messages": [{"role": "user", "content": "my prompt"}], "max_tokens": 99}
    begun = time.monotonic()
    try:
        outcome = await asyncio.wait_for(complete(Call(endpoint, _SETTINGS, body, Caller("WriteCode", "Engineer", "Engineer"))), _LONGEST)
    except errors.LocalLLMError as error:
        fits_a_line(str(error))
        held = f"{error.__cause__!r} {getattr(error, 'response', None) and error.response.headers} {''.join(traceback.format_exception(type(error), error, error.__traceback__))}"
        assert KEY not in held, held
    else:
        assert isinstance(outcome.text, str) and outcome.usage.total_tokens >= 0
    assert time.monotonic() - begun < _LONGEST
    fits_a_line((await see(endpoint, limit=1.0)).sentence("llm"))
    server.close()


def seeds() -> list[bytes]:
    """Where coverage begins."""
    whole = b'data: {"choices": [{"delta": {"content": "fine"}}]}\n\ndata: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    plain = b'{"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}'
    listing = json.dumps({"data": [{"id": "m", "owned_by": "llamacpp"}], "default_generation_settings": {"n_ctx": 4096}}).encode()

    def http(status: int, said: bytes, *headers: bytes, length: int = -1) -> bytes:
        head = [b"HTTP/1.1 %d X" % status, b"content-length: %d" % (len(said) if length < 0 else length), *headers]
        return b"\r\n".join(head) + b"\r\n\r\n" + said

    stream, as_json = b"content-type: text/event-stream", b"content-type: application/json"
    answers = [
        whole, http(200, plain, as_json), http(200, gzip.compress(whole), stream, b"content-encoding: gzip"),
        http(200, whole, stream, length=9999), http(200, whole, stream, length=5), http(503, b'{"error": {"message": "Loading model"}}'),
        http(400, b'{"error": {"message": "exceed_context_size_error n_ctx: 5"}}', as_json), http(422, b"unknown field"),
        http(307, b"", b"location: http://127.0.0.1:1/" + KEY.encode()), http(401, KEY.encode(), b"x-echo: " + KEY.encode()),
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + http(200, whole, stream), b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 99 + b"\r\n", http(429, b"no", b"retry-after: 99999999999999"), b"HTTP/9 x\r\n\r\n", b"HTTP/1.1 204 X\r\n\r\n",
        http(200, b"<html>", b"content-type: text/html"), http(200, b"\x0b\x02", stream, b"content-encoding: br"), b": ping\n\n" * 50, b"data: [1]\n\n" + b"data: {\n\n", b"HTTP/1.1 101 Up\r\nupgrade: x\r\n\r\n",
    ]  # fmt: skip
    return [*answers, whole + b"\x1e" + listing, *(whole + b"\x1e" + answer for answer in answers[1:12])]
