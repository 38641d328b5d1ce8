"""The server: HTTP on a real socket (h11 over asyncio), in the dialects of the servers people run."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import struct
import threading
import time
from dataclasses import replace
from typing import Any, AsyncIterator, Callable, Iterable, Mapping, Optional, Sequence

import h11

from metagpt_localllm.simulator import answers, native
from metagpt_localllm.simulator.answers import Answer
from metagpt_localllm.simulator.dialects import (
    DIALECTS,
    DIALECTS_BY_NAME,
    TOO_LONG,
    Job,
    State,
    about,
    clip,
    left_by_ollama,
    overflow,
    prompt_of,
    refusal,
)
from metagpt_localllm.simulator.faults import Fault, parse_fault
from metagpt_localllm.simulator.machine import Machine, PrefixCache, Stats, seconds, tokenize

__all__ = ["Simulator", "SimulatorThread", "serve"]

#: Simulated seconds between two comments of a server that only keeps the connection alive; and real ones without an end.
_PING, _FOREVER = 30.0, 1e9
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
        too_long: what becomes of a prompt over the context, one of dialects.TOO_LONG; None for what the dialect does.
        tells_window: whether it says how large its context is. If not, it is as Ollama before 0.10, as LM Studio
            without an API of its own (``/api``), and as the others in old versions or behind a proxy.

    Attributes:
        manner: what its dialect means, with ``too_long``.
        stats: what it has done.
        requests: the bodies of all chat requests, in order; ``raw_requests``: the same as they were sent.
        paths: of all requests, in order, without the query.
        faults: the script; may be changed while it runs.

    Raises:
        ValueError: an unknown dialect, or ``too_long``.
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
        too_long: Optional[str] = None,
        tells_window: bool = True,
    ) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"there is no dialect '{dialect}'; known are {', '.join(DIALECTS)}")
        if too_long is not None and too_long not in TOO_LONG:
            raise ValueError(f"a prompt cannot be '{too_long}'; known are {', '.join(filter(None, TOO_LONG))}")
        self.machine = machine or Machine()
        self.dialect, self.model, self.scale = dialect, model, scale
        manner = DIALECTS_BY_NAME[dialect]
        self.manner = manner if too_long is None else replace(manner, too_long=too_long)
        self.tells_window = tells_window
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
        self._demanded = False
        self._jobs: list[Job] = []
        self._running: Optional[asyncio.Task[None]] = None
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
        self._demanded = False
        if not (self.manner.loads_on_demand and self.machine.load_time):
            self.demand()

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
        return not self._demanded or time.monotonic() < self._loaded_at

    def _loaded(self) -> str:
        return "no" if not self._demanded else "loading" if self._loading() else "yes"

    def demand(self) -> None:
        """The model loads from now on, unless it does already."""
        if not self._demanded:
            self._demanded = True
            self._loaded_at = time.monotonic() + self.machine.load_time / self.scale

    def abort_load(self) -> None:
        """What was loaded of it is lost."""
        if self.manner.aborts_load and self._loading():
            self._demanded = False

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
        self.deaf = False  # whether this request goes on when its client has left
        self.lines: Optional[native.Lines] = None  # of an answer to /api/chat

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
        if self.lines is not None and isinstance(payload, Mapping):
            payload = native.whole(payload)
        body = payload if isinstance(payload, bytes) else json.dumps(payload, ensure_ascii=False).encode()
        everything = [("content-type", kind), ("content-length", str(len(body))), *self._software(), *headers]
        head = self.http.send(h11.Response(status_code=status, headers=everything))
        await self._send((head or b"") + (self.http.send(h11.Data(data=body)) or b""))
        await self._send(self.http.send(h11.EndOfMessage()))

    async def _start_stream(self) -> None:
        kind = "text/event-stream" if self.lines is None else "application/x-ndjson"
        headers = [("content-type", kind), ("transfer-encoding", "chunked"), *self._software()]
        await self._say(h11.Response(status_code=200, headers=headers))

    async def _say(self, event: h11.Event) -> None:
        """Sends a part of a stream."""
        await self._send(self.http.send(event))

    async def _data(self, data: bytes) -> None:
        await self._say(h11.Data(data=data))

    def _software(self) -> list[tuple[str, str]]:
        return [("server", self.sim.manner.software)] if self.sim.manner.software else []

    async def _comment(self, text: str) -> None:
        await self._data(f": {text}\n\n".encode())

    async def _event(self, payload: Any) -> None:
        if self.lines is not None:
            await self._data(self.lines.of(payload))
            return
        data = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)
        await self._data(f"data: {data}\n\n".encode())

    async def _end(self) -> None:
        if self.lines is not None:
            await self._data(self.lines.last())
        await self._say(h11.EndOfMessage())

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
        if self.deaf:
            await asyncio.sleep(simulated / self.sim.scale)
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
        target = request.target.decode()
        path = target.split("?")[0]
        sim.paths.append(path)
        headers = {name.decode().lower(): value.decode() for name, value in request.headers}
        if sim._api_key and path != "/health" and headers.get("authorization") != f"Bearer {sim._api_key}":
            await self._reply(401, {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}})
            return
        if path == "/v1/chat/completions" or (path == "/chat/completions" and sim.manner.bare):
            await self._chat()
            return
        if path == "/api/chat" and sim.dialect == "ollama":
            self.lines = native.Lines(sim.model)
            try:
                await self._chat()
            finally:
                self.lines = None
            return
        if not sim.manner.answers_while_loading and sim._loading():
            await self._reply(503, _LOADING)
            return
        if path == "/api/generate" and sim.dialect == "ollama":
            await self._preload()
            return
        state = State(sim.machine, sim.model, sim._loaded(), sim._jobs, sim.tells_window)
        answer = about(sim.manner, target, self._json(), state)
        if answer is not None:
            await self._interrupt()
            await self._reply(200, answer)
        else:
            await self._reply(404, _NOT_FOUND)

    async def _preload(self) -> None:
        """Ollama's request without a prompt."""
        self.sim.demand()
        await self._load()
        await self._reply(200, {"model": self.sim.model, "response": "", "done": True, "done_reason": "load"})

    async def _load(self) -> None:
        """Waits for the model; a client that leaves meanwhile ends the load where the server is of that kind."""
        try:
            await self._work((self.sim._loaded_at - time.monotonic()) * self.sim.scale)
        except (_ClientGone, ConnectionError):
            self.sim.abort_load()
            raise

    async def _interrupt(self) -> None:
        """What llama-cpp-python does to the stream that runs when anything else needs the model."""
        running, task = self.sim._running, asyncio.current_task()
        if self.sim.manner.interrupted and running is not None and running is not task:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _json(self) -> dict[str, Any]:
        try:
            body = json.loads(self.body or b"{}")
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

    # -------------------------------------------------------------------------------- chat

    async def _chat(self) -> None:
        sim, stats = self.sim, self.sim.stats
        body = self._json() if self.lines is None else native.asked(self._json())
        stats.requests += 1
        number = stats.requests
        sim.requests.append(body)
        sim.raw_requests.append(self.body)
        messages: list[Mapping[str, Any]] = body.get("messages") or []
        fault = sim._strike("".join(str(message.get("content")) for message in messages))
        if await self._fail_at_once(fault):
            return
        manner = sim.manner
        if sim._loading() and not manner.answers_while_loading:
            await self._reply(503, _LOADING)
            return
        refused = refusal(manner, body)
        if refused is not None:
            await self._reply(*refused)
            return
        sim.demand()
        context = sim.machine.context
        if fault and fault.kind == "truncate" and manner.too_long not in ("cut", "clipped"):
            manner = replace(manner, too_long="blank" if sim.dialect == "lmstudio" else "cut")
        cuts = manner.too_long in ("cut", "clipped")
        if cuts or sim.dialect == "ollama":
            body = dict(left_by_ollama(body, context))
        prompt, partial = prompt_of(manner, body)
        if cuts:
            prompt = clip(prompt, context, halved=manner.too_long == "cut")
        job = Job(number, len(prompt))
        error = None if cuts else overflow(manner, len(prompt), _wanted(body, context), context)
        if error is not None and manner.too_long != "blank":
            await self._refuse(error, manner.too_long, bool(body.get("stream")))
            return
        await self._interrupt()
        self.deaf = manner.stops == "stream" and not body.get("stream")
        try:
            await self._load()
            if error is not None:
                await self._leave_blank(body, len(prompt))
                return
            async with self._slot(job):
                await self._generate(body, prompt, partial, fault, job)
        except (_ClientGone, ConnectionError):
            stats.cancelled += 1
            stats.wasted_tokens += job.spent
            raise
        finally:
            self.deaf = False

    async def _refuse(self, error: Mapping[str, Any], how: str, stream: bool) -> None:
        """Says that the prompt does not fit, the way that ``how`` of TOO_LONG names."""
        if not stream or how not in ("broken", "reported"):
            await self._reply(200 if how == "reported" else 400, error)
            return
        await self._start_stream()
        if how == "reported":
            event = f"event: error\ndata: {json.dumps(error)}\n\n"
            await self._send(self.http.send(h11.Data(data=event.encode())))
        await self._end()

    async def _leave_blank(self, body: Mapping[str, Any], prompt: int) -> None:
        """An answer like any other, but for its tokens: there are none (lmstudio-bug-tracker #2339)."""
        totals = {"usage": {"prompt_tokens": prompt, "completion_tokens": 0, "total_tokens": prompt}}
        if not body.get("stream"):
            await self._reply(200, _whole(self.sim.model, Answer(), "", "stop", totals))
            return
        await self._start_stream()
        chunk = _chunker(self.sim.model)
        await self._event(chunk({}, "stop"))
        if (body.get("stream_options") or {}).get("include_usage"):
            await self._event({**chunk(None), **totals})
        await self._event("[DONE]")
        await self._end()

    @contextlib.asynccontextmanager
    async def _slot(self, job: Job) -> AsyncIterator[None]:
        """A slot for the job once there is one; a client that goes away leaves the queue."""
        while self.sim._slots.locked():
            await self._work(0.2 if self.sim.scale <= 1 else 0.2 * min(self.sim.scale, 10))
        async with self.sim._slots:
            self.sim._running = asyncio.current_task()
            self.sim._jobs.append(job)
            try:
                yield
            finally:
                self.sim._jobs.remove(job)
                self.sim._running = None

    async def _fail_at_once(self, fault: Optional[Fault]) -> bool:
        """Faults that come before any work; whether there was one."""
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
            self.sim._cache = PrefixCache(self.sim.machine.slots)  # a model that loads remembers nothing
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

    async def _generate(
        self, body: Mapping[str, Any], prompt: list[str], partial: Optional[str], fault: Optional[Fault], job: Job
    ) -> None:
        """Reads the prompt and writes the answer; ``partial``: its beginning, which is there already."""
        sim, machine, stats, manner = self.sim, self.sim.machine, self.sim.stats, self.sim.manner
        stream = bool(body.get("stream"))
        chunk = _chunker(sim.model)
        if stream and manner.early:
            await self._start_stream()
        begun = time.monotonic()
        shows = manner.progress if stream and manner.early else ""
        if shows == "events" and not body.get("return_progress"):
            shows = ""
        await self._prefill(prompt, job, chunk, shows)
        prefill_ms = (time.monotonic() - begun) * 1000 * sim.scale

        messages = list(body.get("messages") or [])
        if partial is not None and messages and messages[-1].get("role") == "assistant":
            messages.pop()  # what is continued is no part of what is asked
        answer = sim._answer(messages, body.get("tools"))
        front = partial if partial and answer.text.startswith(partial) else ""
        reasoning = tokenize(answer.reasoning)
        pieces = [*reasoning, *tokenize(answer.tool_arguments if answer.tool_name else answer.text[len(front) :])]
        room = machine.context - job.prompt
        limit = max(min(_wanted(body, room), room), 1)
        reason = "length" if len(pieces) > limit else "tool_calls" if answer.tool_name else "stop"
        pieces = pieces[:limit]
        if stream and not manner.early:
            await self._work(seconds(1, machine.decode_speed))
            await self._start_stream()
        for number, piece in enumerate(pieces):
            if fault is not None and number == fault.after and await self._fail_in_stream(fault):
                stats.wasted_tokens += job.spent
                return
            await self._work(seconds(1, machine.decode_speed))
            stats.decode_tokens += 1
            job.decoded += 1
            if stream:
                await self._event(chunk(_delta(number, piece, len(reasoning), answer.tool_name)))
        if fault is not None and fault.after >= len(pieces) and await self._fail_in_stream(fault):
            stats.wasted_tokens += job.spent
            return
        totals = self._totals(job, prefill_ms, (time.monotonic() - begun) * 1000 * sim.scale - prefill_ms)
        if fault is not None and fault.kind == "no_usage":
            del totals["usage"]
        stats.completed += 1
        if not stream:
            text = (front if manner.repeats else "") + "".join(pieces)
            await self._reply(200, _whole(sim.model, answer, text, reason, totals))
            return
        await self._event({**chunk({}, reason), **(totals if manner.usage == "always" else {})})
        asked = manner.usage == "asked" and (body.get("stream_options") or {}).get("include_usage")
        if asked and "usage" in totals:
            await self._event({**chunk(None), **totals})
        if manner.done and (fault is None or fault.kind != "no_done"):
            await self._event("[DONE]")
        await self._end()

    async def _prefill(self, prompt: list[str], job: Job, chunk: Callable[..., dict[str, Any]], shows: str) -> None:
        """Reads what of the prompt is not cached; ``shows``: how one sees that, as ``Dialect.progress`` names it."""
        sim, machine = self.sim, self.sim.machine
        job.cached = job.processed = sim._cache.shared(prompt) if machine.prefix_cache else 0
        sim.stats.cached_tokens += job.cached
        while job.processed < job.prompt:
            if shows == "events":
                await self._event(_progress(chunk, job))
            size = min(machine.batch, job.prompt - job.processed)
            await self._work(seconds(size, machine.prefill_speed))
            job.processed += size
            sim.stats.prefill_tokens += size
            if shows == "comments":
                await self._comment(f"keepalive {job.processed - job.cached}/{job.prompt - job.cached}")
            sim._cache.hold(prompt[: job.processed])
        if shows == "events":
            await self._event(_progress(chunk, job))

    def _totals(self, job: Job, prefill_ms: float, decode_ms: float) -> dict[str, Any]:
        """What the last chunk tells of the whole answer; times are those of the simulated machine."""
        usage: dict[str, Any] = {"prompt_tokens": job.prompt, "completion_tokens": job.decoded,
                                 "total_tokens": job.prompt + job.decoded}  # fmt: skip
        if self.sim.manner.cached:
            usage["prompt_tokens_details"] = {"cached_tokens": job.cached}
        if self.sim.manner.progress != "events":
            return {"usage": usage}
        timings = {"cache_n": job.cached, "prompt_n": job.prompt - job.cached, "prompt_ms": prefill_ms,
                   "predicted_n": job.decoded, "predicted_ms": decode_ms}  # fmt: skip
        return {"usage": usage, "timings": timings}

    async def _fail_in_stream(self, fault: Fault) -> bool:
        """Faults in the middle of an answer; whether that ends it."""
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


_NOT_FOUND = {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
_LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


def _wanted(body: Mapping[str, Any], most: int) -> int:
    """Tokens that the answer may have by the request; ``most`` where it does not say."""
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or most)


def _chunker(model: str) -> Callable[..., dict[str, Any]]:
    created = int(time.time())
    identity = f"chatcmpl-{time.monotonic_ns():x}"

    def chunk(delta: Optional[Mapping[str, Any]], reason: Optional[str] = None) -> dict[str, Any]:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
        return {"id": identity, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices}

    return chunk


def _progress(chunk: Callable[..., dict[str, Any]], job: Job) -> dict[str, Any]:
    state = {"total": job.prompt, "cache": job.cached, "processed": job.processed, "time_ms": 0}
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
    load_time: float, slots: int, faults: Sequence[str], too_long: Optional[str], tells_window: bool,
) -> None:  # fmt: skip
    """Serves until Ctrl-C and then says what was done; durations in seconds.

    Raises:
        ValueError: an unknown dialect, fault or ``too_long``.
    """
    machine = Machine(prefill_speed, decode_speed, load_time, slots, context)
    script = [parse_fault(text) for text in faults]

    async def run() -> None:
        async with Simulator(
            machine, dialect=dialect, model=model, port=port, scale=scale, faults=script, too_long=too_long,
            tells_window=tells_window,
        ) as simulator:  # fmt: skip
            print(f"simulated {dialect} server: {simulator.base_url}  (model {model}; Ctrl-C ends it)", flush=True)
            try:
                await asyncio.sleep(_FOREVER)
            finally:
                print(simulator.stats)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
