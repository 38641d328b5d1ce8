"""A server like vLLM that costs its machine next to nothing: one token for every stream at each step of the batch.

    python -m bench.batch_server

The simulator has a model's speeds and faults, but spends about 150 µs of a core on each token, and a client at full load
no more than 50: with a thousand streams it would measure itself. This one knows nothing but what a benchmark of clients
needs: vLLM's list of models, its health, its chunks as they are on the wire, and a batch that moves at a fixed pace.

A prompt ends in ``tokens=N step=S first=F``: the answer has N tokens, one each S seconds, the first after F seconds.
``/late`` tells how far the steps have been behind, in seconds: the worst since it was last asked, and CPU seconds since the start.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import re
import time
from typing import Any, Optional

__all__ = ["MODEL", "WORD", "prompt_of"]

MODEL = "qwen2.5-coder-7b"
WORD = " token"
#: Tokens that go out together where the step is 0: what a server that is far ahead of its client has in its buffers.
_AT_ONCE = 64
_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_WISH = re.compile(r"tokens=(\d+) step=([\d.]+) first=([\d.]+)$")


def prompt_of(tokens: int, step: float, first: float) -> str:
    """The end of a prompt that asks for such an answer."""
    return f"tokens={tokens} step={step:g} first={first:g}"


def _chunk(delta: Optional[dict[str, str]], reason: Optional[str] = None, usage: Any = None) -> bytes:
    """As vLLM 0.11 writes it, in its frame of chunked transfer encoding."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, "token_ids": None}
    chunk: dict[str, Any] = {
        "id": "chatcmpl-3f2a9c1de4b04c5f8a7e6d5c4b3a2918", "object": "chat.completion.chunk", "created": 1764000000,
        "model": MODEL, "choices": [] if delta is None else [choice],
    }  # fmt: skip
    if usage is not None:
        chunk["usage"] = usage
    return _frame(f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode())


def _frame(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n" + _chunk({"role": "assistant", "content": ""})
)
_TOKEN = _chunk({"content": WORD})
_END = _frame(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class _Batch:
    """The streams that run: each gets a token whenever its step is over, all of the same moment in one go."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, _Connection, float, int]] = []
        self._numbers = itertools.count()
        self._timer: Optional[asyncio.TimerHandle] = None
        self.behind = 0.0

    def add(self, connection: _Connection, tokens: int, step: float, first: float) -> None:
        now = time.monotonic() + first
        # On the grid of the step: a batch moves as one.
        moment = -(-now // step) * step if step else now
        heapq.heappush(self._due, (moment, next(self._numbers), connection, step, tokens))
        if self._timer is None or moment < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(moment, self._run)

    def _run(self) -> None:
        self._timer = None
        now = time.monotonic()
        again: list[tuple[float, int, _Connection, float, int]] = []
        while self._due and self._due[0][0] <= now:
            moment, number, connection, step, left = heapq.heappop(self._due)
            if step:
                self.behind = max(self.behind, now - moment)
            some = 1 if step else min(_AT_ONCE, left)
            connection.send(_TOKEN * some)
            if left == some:
                connection.finish()
            elif not connection.gone:
                again.append((moment + step if step else now, number, connection, step, left - some))
        for entry in again:
            heapq.heappush(self._due, entry)
        # Not only for those: the loop's clock may have come to its timer a little early.
        if self._due:
            self._timer = asyncio.get_running_loop().call_at(self._due[0][0], self._run)


class _Connection(asyncio.Protocol):
    """Reads whole requests, one after the other."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch
        self._got = b""
        self._tokens = self._prompt = 0
        self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self.gone = True

    def data_received(self, data: bytes) -> None:
        self._got += data
        end = self._got.find(b"\r\n\r\n")
        if end < 0:
            return
        found = _LENGTH.search(self._got, 0, end)
        whole = end + 4 + (int(found.group(1)) if found else 0)
        if len(self._got) < whole:
            return
        head, body, self._got = self._got[:end], self._got[end + 4 : whole], self._got[whole:]
        self._serve(head.split(b" ", 2)[1].decode(), body)

    def _serve(self, path: str, body: bytes) -> None:
        if path == "/v1/chat/completions":
            wish = _WISH.search(json.loads(body)["messages"][-1]["content"])
            assert wish is not None, "a prompt that says nothing about its answer"
            self._tokens, self._prompt = int(wish.group(1)), len(body) // 4
            self.send(_HEAD)
            self._batch.add(self, self._tokens, float(wish.group(2)), float(wish.group(3)))
            return
        answer: Any = {
            "/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "vllm", "root": MODEL,
                                                       "max_model_len": 32768}]},
            "/health": {},
            "/version": {"version": "0.11.0"},
            "/late": {"behind": self._batch.behind, "cpu": time.process_time()},
        }.get(path)  # fmt: skip
        if path == "/late":
            self._batch.behind = 0.0
        status = b"404 Not Found" if answer is None else b"200 OK"
        content = json.dumps(answer if answer is not None else {}).encode()
        self.send(b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (status, len(content), content))

    def send(self, data: bytes) -> None:
        if not self.gone:
            self._transport.write(data)

    def finish(self) -> None:
        usage = {"prompt_tokens": self._prompt, "completion_tokens": self._tokens, "total_tokens": self._prompt + self._tokens}
        self.send(_chunk({"content": ""}, "stop") + _chunk(None, usage=usage) + _END)


async def _serve() -> None:
    batch = _Batch()
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(batch), "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
