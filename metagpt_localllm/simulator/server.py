"""The server: HTTP on a real socket (h11 over asyncio), in the dialects of the servers people run.

What each dialect does is as observed or read in the servers' code: llama.cpp b11549, Ollama 0.33,
vLLM 0.32; LM Studio from its documentation.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import struct
import threading
import time
from typing import Any, AsyncIterator, Callable, Iterable, Mapping, Optional, Sequence

import h11

from metagpt_localllm.simulator import answers
from metagpt_localllm.simulator.answers import Answer
from metagpt_localllm.simulator.faults import Fault, parse_fault
from metagpt_localllm.simulator.machine import Machine, PrefixCache, Stats, render, seconds, tokenize

__all__ = ["DIALECTS", "Simulator", "SimulatorThread", "serve"]

#: The dialects, and whom each names as the owner of a model.
_OWNERS = {"llama.cpp": "llamacpp", "ollama": "library", "lmstudio": "organization_owner", "vllm": "vllm", "plain": "someone"}
DIALECTS = tuple(_OWNERS)
_PING = 30.0
_FOREVER = 1e9
AnswerFunction = Callable[[Sequence[Mapping[str, Any]], Optional[Sequence[Mapping[str, Any]]]], Answer]


class _ClientGone(Exception):
    """The client has closed the connection."""


class Simulator:
    """An OpenAI-compatible server; use it as ``async with``, or SimulatorThread from code without a loop.

    Args:
        machine: how fast it is and how much it holds.
        dialect: one of DIALECTS.
        model: name of the model it serves.
        scale: how many times faster than real time everything passes.
        faults: what goes wrong.
        answer: gives the answer to messages and tools; by default what MetaGPT's own prompts ask for.
        api_key: demanded of every request when given.
        host: address to bind.
        port: to bind; 0 takes a free one.

    Attributes:
        stats: what it has done.
        requests: the bodies of all chat requests, in order.
        faults: the script; may be changed while it runs.

    Raises:
        ValueError: an unknown dialect.
    """

    def __init__(
        self,
        machine: Optional[Machine] = None,
        *,
        dialect: str = "llama.cpp",
        model: str = "codebooga-34b",
        scale: float = 1.0,
        faults: Iterable[Fault] = (),
        answer: AnswerFunction = answers.answer,
        api_key: Optional[str] = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"there is no dialect '{dialect}'; known are {', '.join(DIALECTS)}")
        self.machine = machine or Machine()
        self.dialect, self.model, self.scale = dialect, model, scale
        self.faults = list(faults)
        self.stats = Stats()
        self.requests: list[dict[str, Any]] = []
        self.raw_requests: list[bytes] = []
        self.paths: list[str] = []
        self._answer, self._api_key = answer, api_key
        self._host, self._port = host, port
        self._server: Optional[asyncio.AbstractServer] = None
        self._connections: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(self.machine.slots)
        self._cache = PrefixCache(self.machine.slots)
        self._loaded_at = 0.0
        self._restart: Optional[asyncio.Task[None]] = None

    @property
    def base_url(self) -> str:
        """Of the OpenAI API, with ``/v1``."""
        return f"http://{self._host}:{self._port}/v1"

    async def __aenter__(self) -> Simulator:
        await self.come_up()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.go_down()

    async def come_up(self) -> None:
        """Starts to listen; the model loads from now on."""
        self._slots = asyncio.Semaphore(self.machine.slots)
        self._server = await asyncio.start_server(self._serve_connection, self._host, self._port, limit=1 << 20)
        self._port = self._server.sockets[0].getsockname()[1]
        self._loaded_at = time.monotonic() + self.machine.load_time / self.scale

    async def go_down(self) -> None:
        """Stops as if killed: connections are cut, new ones refused. ``come_up`` starts it at the same port."""
        if self._restart is not None:
            self._restart.cancel()
        await self._cut()

    def crash(self, duration: float) -> None:
        """Goes down at once, for ``duration`` simulated seconds."""

        async def restart() -> None:
            await self._cut()
            self._cache = PrefixCache(self.machine.slots)
            await self._sleep(duration)
            await self.come_up()

        self._restart = asyncio.create_task(restart())

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------- HTTP

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await _Exchange(self, reader, writer).run()
        except (ConnectionError, _ClientGone, h11.RemoteProtocolError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _sleep(self, simulated: float) -> None:
        if simulated > 0:
            await asyncio.sleep(simulated / self.scale)

    def _loading(self) -> bool:
        return time.monotonic() < self._loaded_at

    def _strike(self, text: str) -> Optional[Fault]:
        for fault in self.faults:
            if fault.strikes(self.stats.requests, text):
                self.stats.faults[fault.kind] = self.stats.faults.get(fault.kind, 0) + 1
                return fault
        return None


class _Exchange:
    """One connection; it serves one request after another."""

    def __init__(self, simulator: Simulator, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.sim = simulator
        self.reader, self.writer = reader, writer
        self.http = h11.Connection(h11.SERVER)
        self.body = b""

    async def run(self) -> None:
        while True:
            request = await self._next_request()
            if request is None:
                return
            await self._route(request)
            if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
                return
            self.http.start_next_cycle()

    async def _next_request(self) -> Optional[h11.Request]:
        request: Optional[h11.Request] = None
        body: list[bytes] = []
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                data = await self.reader.read(65536)
                self.http.receive_data(data)
                if not data and request is None:
                    return None
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self.body = b"".join(body)
                return request
            else:
                return None

    async def _send(self, data: Optional[bytes]) -> None:
        if data:
            self.writer.write(data)
            await self.writer.drain()

    async def _reply(
        self, status: int, payload: Any, headers: Sequence[tuple[str, str]] = (), kind: str = "application/json"
    ) -> None:
        body = payload if isinstance(payload, bytes) else json.dumps(payload, ensure_ascii=False).encode()
        everything = [("content-type", kind), ("content-length", str(len(body))), *headers]
        head = self.http.send(h11.Response(status_code=status, headers=everything))
        await self._send((head or b"") + (self.http.send(h11.Data(data=body)) or b""))
        await self._send(self.http.send(h11.EndOfMessage()))

    async def _start_stream(self) -> None:
        await self._send(
            self.http.send(h11.Response(status_code=200, headers=[("content-type", "text/event-stream"),
                                                                  ("transfer-encoding", "chunked")]))
        )  # fmt: skip

    async def _event(self, payload: Any) -> None:
        data = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)
        await self._send(self.http.send(h11.Data(data=f"data: {data}\n\n".encode())))

    async def _end(self) -> None:
        await self._send(self.http.send(h11.EndOfMessage()))

    def _reset(self) -> None:
        """Breaks the connection off with a TCP reset."""
        sock = self.writer.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        raise _ClientGone

    async def _work(self, simulated: float) -> None:
        """Time passes, unless the client goes away meanwhile."""
        if simulated <= 0:
            return
        try:
            data = await asyncio.wait_for(self.reader.read(65536), simulated / self.sim.scale)
        except asyncio.TimeoutError:
            return
        if not data:
            raise _ClientGone
        self.http.receive_data(data)

    # -------------------------------------------------------------------------------- what is asked

    async def _route(self, request: h11.Request) -> None:
        sim = self.sim
        path = request.target.decode().split("?")[0]
        sim.paths.append(path)
        headers = {name.decode().lower(): value.decode() for name, value in request.headers}
        if sim._api_key and path != "/health" and headers.get("authorization") != f"Bearer {sim._api_key}":
            await self._reply(401, {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}})
            return
        if path in ("/v1/chat/completions", "/chat/completions"):
            await self._chat()
            return
        if sim.dialect == "llama.cpp" and sim._loading():
            await self._reply(503, _LOADING)
            return
        answer = self._about(path)
        await (self._reply(404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}})
               if answer is None else self._reply(200, answer))  # fmt: skip

    def _about(self, path: str) -> Optional[Any]:
        sim, machine = self.sim, self.sim.machine
        if path in ("/v1/models", "/models"):
            entry: dict[str, Any] = {"id": sim.model, "object": "model", "created": 0, "owned_by": _OWNERS[sim.dialect]}
            if sim.dialect == "llama.cpp":
                entry.update(meta={"n_ctx": machine.context, "n_ctx_train": 16384})
            if sim.dialect == "vllm":
                entry.update(max_model_len=machine.context, root=sim.model)
            return {"object": "list", "data": [entry]}
        if path in ("/health", "/v1/health") and sim.dialect in ("llama.cpp", "vllm"):
            return {"status": "ok"}
        body = self._json()
        if sim.dialect == "llama.cpp":
            if path == "/props":
                return {
                    "default_generation_settings": {"params": {}, "n_ctx": machine.context},
                    "total_slots": machine.slots,
                    "model_alias": sim.model,
                    "modalities": {"vision": False, "audio": False},
                    "build_info": "simulated",
                }
            if path == "/v1/chat/completions/input_tokens":
                count = len(render(body.get("messages") or (), body.get("tools")))
                return {"input_tokens": count, "object": "response.input_tokens"}
            if path == "/tokenize":
                return {"tokens": list(range(len(tokenize(str(body.get("content", ""))))))}
        if sim.dialect == "vllm" and path == "/tokenize":
            tokens = render(body.get("messages") or (), body.get("tools"))
            return {"count": len(tokens), "max_model_len": machine.context, "tokens": list(range(len(tokens)))}
        if sim.dialect == "vllm" and path == "/version":
            return {"version": "0.32.0"}
        if sim.dialect == "ollama":
            if path == "/api/version":
                return {"version": "0.33.0"}
            if path == "/api/ps":
                return {"models": [{"name": sim.model, "model": sim.model, "context_length": machine.context}]}
        if sim.dialect == "lmstudio" and path == "/api/v1/models":
            instance = {"id": sim.model, "config": {"context_length": machine.context, "parallel": machine.slots}}
            return {"models": [{"type": "llm", "key": sim.model, "loaded_instances": [instance],
                                "max_context_length": 16384, "capabilities": {"vision": False}}]}  # fmt: skip
        return None

    def _json(self) -> dict[str, Any]:
        try:
            body = json.loads(self.body or b"{}")
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

    # -------------------------------------------------------------------------------- chat

    async def _chat(self) -> None:
        sim, stats = self.sim, self.sim.stats
        body = self._json()
        stats.requests += 1
        sim.requests.append(body)
        sim.raw_requests.append(self.body)
        messages: list[Mapping[str, Any]] = body.get("messages") or []
        fault = sim._strike("".join(str(message.get("content")) for message in messages))
        if await self._fail_at_once(fault):
            return
        if sim._loading() and sim.dialect == "llama.cpp":
            await self._reply(503, _LOADING)
            return
        prompt = render(messages, body.get("tools"))
        wanted = body.get("max_tokens") or body.get("max_completion_tokens") or sim.machine.context
        if sim.dialect != "ollama" and not (fault and fault.kind == "truncate"):
            error = _overflow(sim.dialect, len(prompt), int(wanted), sim.machine.context)
            if error is not None:
                await self._reply(400, error)
                return
        elif len(prompt) > sim.machine.context:
            half = sim.machine.context // 4
            prompt = prompt[:half] + prompt[-half:]
        wait = sim._loaded_at - time.monotonic()
        done = [0, 0]
        try:
            await self._work(wait * sim.scale)
            async with self._slot():
                await self._generate(body, prompt, fault, done)
        except (_ClientGone, ConnectionError):
            stats.cancelled += 1
            stats.wasted_tokens += sum(done)
            raise

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A slot once there is one; a client that goes away leaves the queue."""
        while self.sim._slots.locked():
            await self._work(0.2 if self.sim.scale <= 1 else 0.2 * min(self.sim.scale, 10))
        async with self.sim._slots:
            yield

    async def _fail_at_once(self, fault: Optional[Fault]) -> bool:
        """Faults that come before any work."""
        if fault is None:
            return False
        if fault.kind == "hang":
            await self._work(_FOREVER * self.sim.scale)
        elif fault.kind in ("hang_after_headers", "keepalive_only"):
            await self._start_stream()
            while True:
                await self._work(_PING if fault.kind == "keepalive_only" else _FOREVER * self.sim.scale)
                await self._send(self.http.send(h11.Data(data=b": keep-alive\n\n")))
        elif fault.kind == "loading":
            self.sim._loaded_at = time.monotonic() + fault.duration / self.sim.scale
            await self._reply(503, _LOADING)
        elif fault.kind == "busy":
            await self._reply(429, {"error": {"message": "Too many requests", "type": "rate_limit_error"}},
                              [("retry-after", f"{fault.retry_after:g}")])  # fmt: skip
        elif fault.kind == "error":
            await self._reply(fault.status, {"error": {"message": "the model runner has unexpectedly stopped"}})
        elif fault.kind == "html":
            page = b"<html><head><title>504 Gateway Time-out</title></head><body>nginx</body></html>"
            await self._reply(504, page, kind="text/html")
        elif fault.kind == "reset":
            self._reset()
        elif fault.kind == "refuse":
            self.sim.crash(fault.duration)
            self._reset()
        elif fault.kind == "empty":
            await self._start_stream()
            await self._end()
        else:
            return False
        return True

    async def _generate(self, body: Mapping[str, Any], prompt: list[str], fault: Optional[Fault], done: list[int]) -> None:
        sim, machine, stats = self.sim, self.sim.machine, self.sim.stats
        stream = bool(body.get("stream"))
        chunk = _chunker(sim.model)
        # Ollama sends its headers with the first token only.
        early = stream and sim.dialect != "ollama"
        if early:
            await self._start_stream()
        cached = sim._cache.shared(prompt) if machine.prefix_cache else 0
        stats.cached_tokens += cached
        begun = time.monotonic()
        progress = early and sim.dialect == "llama.cpp" and body.get("return_progress")
        position = cached
        while position < len(prompt):
            if progress:
                await self._event(_progress(chunk, cached, position, len(prompt)))
            size = min(machine.batch, len(prompt) - position)
            await self._work(seconds(size, machine.prefill_speed))
            position += size
            stats.prefill_tokens += size
            done[0] += size
            sim._cache.hold(prompt[:position])
        if progress:
            await self._event(_progress(chunk, cached, len(prompt), len(prompt)))
        prefill_ms = (time.monotonic() - begun) * 1000 * sim.scale

        answer = sim._answer(body.get("messages") or [], body.get("tools"))
        reasoning = tokenize(answer.reasoning)
        pieces = [*reasoning, *(tokenize(answer.tool_arguments) if answer.tool_name else tokenize(answer.text))]
        room = machine.context - len(prompt)
        limit = max(min(int(body.get("max_tokens") or room), room), 1)
        reason = "length" if len(pieces) > limit else "tool_calls" if answer.tool_name else "stop"
        pieces = pieces[:limit]
        if stream and not early:
            await self._work(seconds(1, machine.decode_speed))
            await self._start_stream()
        for number, piece in enumerate(pieces):
            if fault is not None and number == fault.after and await self._fail_in_stream(fault, stream):
                stats.wasted_tokens += sum(done)
                return
            await self._work(seconds(1, machine.decode_speed))
            stats.decode_tokens += 1
            done[1] += 1
            if stream:
                await self._event(chunk(_delta(number, piece, len(reasoning), answer.tool_name)))
        if fault is not None and fault.after >= len(pieces) and await self._fail_in_stream(fault, stream):
            stats.wasted_tokens += sum(done)
            return
        decode_ms = (time.monotonic() - begun) * 1000 * sim.scale - prefill_ms
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(pieces), "total_tokens": len(prompt) + len(pieces),
                 "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip
        timings = {"cache_n": cached, "prompt_n": len(prompt) - cached, "prompt_ms": prefill_ms,
                   "predicted_n": len(pieces), "predicted_ms": decode_ms}  # fmt: skip
        totals: dict[str, Any] = {} if fault is not None and fault.kind == "no_usage" else {"usage": usage}
        if sim.dialect == "llama.cpp":
            totals["timings"] = timings
        stats.completed += 1
        if not stream:
            await self._reply(200, _whole(sim.model, answer, "".join(pieces), reason, totals))
            return
        await self._event(chunk({}, reason))
        if (body.get("stream_options") or {}).get("include_usage") and "usage" in totals:
            await self._event({**chunk(None), **totals})
        if fault is None or fault.kind != "no_done":
            await self._event("[DONE]")
        await self._end()

    async def _fail_in_stream(self, fault: Fault, stream: bool) -> bool:
        """Faults in the middle of an answer."""
        if fault.kind == "stall":
            await self._work(_FOREVER * self.sim.scale)
        elif fault.kind == "drop":
            self._reset()
        elif fault.kind == "close":
            await self._end()
        elif fault.kind == "done_without_finish":
            await self._event("[DONE]")
            await self._end()
        elif fault.kind == "stream_error":
            await self._event({"error": {"message": "the model runner has unexpectedly stopped", "type": "server_error"}})
            await self._end()
        else:
            return False
        return True


_LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


def _chunker(model: str) -> Callable[..., dict[str, Any]]:
    created = int(time.time())
    identity = f"chatcmpl-{time.monotonic_ns():x}"

    def chunk(delta: Optional[Mapping[str, Any]], reason: Optional[str] = None) -> dict[str, Any]:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
        return {"id": identity, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices}

    return chunk


def _progress(chunk: Callable[..., dict[str, Any]], cached: int, processed: int, total: int) -> dict[str, Any]:
    state = {"total": total, "cache": cached, "processed": processed, "time_ms": 0}
    return {**chunk({"role": "assistant", "content": None}), "prompt_progress": state}


def _delta(number: int, piece: str, reasoning: int, tool: Optional[str]) -> dict[str, Any]:
    if number < reasoning:
        return {"reasoning_content": piece}
    if tool is None:
        return {"content": piece}
    function: dict[str, str] = {"arguments": piece}
    call: dict[str, Any] = {"index": 0, "function": function}
    if number == reasoning:
        function["name"] = tool
        call.update(id="call_0", type="function")
    return {"tool_calls": [call]}


def _whole(model: str, answer: Answer, text: str, reason: str, totals: Mapping[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if answer.tool_name:
        function = {"name": answer.tool_name, "arguments": answer.tool_arguments}
        message.update(content=None, tool_calls=[{"id": "call_0", "type": "function", "function": function}])
    elif answer.reasoning:
        message.update(content=text[len(answer.reasoning) :], reasoning_content=answer.reasoning)
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {"id": "chatcmpl-0", "object": "chat.completion", "created": int(time.time()), "model": model,
            "choices": [choice], **totals}  # fmt: skip


def _overflow(dialect: str, prompt: int, wanted: int, context: int) -> Optional[dict[str, Any]]:
    """The error body for a prompt that does not fit, in the words of each server."""
    if dialect == "vllm" and prompt + wanted > context:
        message = (
            f"This model's maximum context length is {context} tokens. However, you requested {wanted} output tokens and "
            f"your prompt contains {prompt} input tokens, for a total of {prompt + wanted} tokens."
        )
        return {"error": {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400}}
    if prompt < context:
        return None
    if dialect == "lmstudio":
        return {"error": "The number of tokens to keep from the initial prompt is greater than the context length "
                         f"(n_keep: {prompt}>= n_ctx: {context})."}  # fmt: skip
    message = f"request ({prompt} tokens) exceeds the available context size ({context} tokens), try increasing it"
    return {"error": {"code": 400, "message": message, "type": "exceed_context_size_error",
                      "n_prompt_tokens": prompt, "n_ctx": context}}  # fmt: skip


class SimulatorThread:
    """A Simulator on an event loop of its own, for code that has none. Takes the same arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._make: Callable[[], Simulator] = functools.partial(Simulator, *args, **kwargs)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="simulator", daemon=True)

    def __enter__(self) -> Simulator:
        self._thread.start()

        async def start() -> Simulator:
            simulator = self._make()
            await simulator.come_up()
            return simulator

        self._simulator = asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)
        return self._simulator

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._simulator.go_down(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def serve(
    *, dialect: str, model: str, port: int, scale: float, context: int, prefill_speed: float, decode_speed: float,
    load_time: float, slots: int, faults: Sequence[str] = (),
) -> None:  # fmt: skip
    """Serves until Ctrl-C and then says what was done; durations in seconds.

    Raises:
        ValueError: an unknown dialect or fault.
    """
    machine = Machine(prefill_speed, decode_speed, load_time, slots, context)
    script = [parse_fault(text) for text in faults]

    async def run() -> None:
        async with Simulator(machine, dialect=dialect, model=model, port=port, scale=scale, faults=script) as simulator:
            print(f"simulated {dialect} server: {simulator.base_url}  (model {model}; Ctrl-C ends it)", flush=True)
            try:
                await asyncio.sleep(_FOREVER)
            finally:
                print(simulator.stats)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
