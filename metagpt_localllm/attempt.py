"""One attempt: the request goes out, the stream is read, and a silent server is looked after."""

from __future__ import annotations

import asyncio
from typing import Optional

import anyio
import httpx

from metagpt_localllm import errors, events, failures, servers
from metagpt_localllm.answer import Answer, OddChunk, chunk_of
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.lifecycle import Phase
from metagpt_localllm.quoting import SECRET
from metagpt_localllm.run import Run, request_to
from metagpt_localllm.servers.base import Progress
from metagpt_localllm.sse import MAX_EVENT_BYTES, EventTooLarge, SSEDecoder
from metagpt_localllm.transport import Endpoint, client_for
from metagpt_localllm.unpacking import BodyTooLarge, error_text, pieces, read_body
from metagpt_localllm.watch import watch

__all__ = ["attempt", "broken"]

#: Seconds without a token after which an answer is said to stall; in scaled time at the least.
_STALLED, _LEAST_STALLED = 10.0, 0.2


async def attempt(run: Run, content: bytes) -> Optional[Failure]:
    """Sends the request and reads the answer; None when it is whole. The connection is closed whatever happens."""
    failure: Optional[Failure] = None
    endpoint, answer, life = run.call.endpoint, run.answer, run.life
    timeout = httpx.Timeout(None, connect=run.deadlines.connect)
    with anyio.CancelScope(deadline=life.deadline) as scope:
        # A server that has not answered the first question is not asked others: they would only pile up there.
        watcher = None if run.server is servers.UNKNOWN else asyncio.ensure_future(_watch(run, scope))
        stalls = _TellStalls(run)
        try:
            async with client_for(endpoint).stream(
                "POST", endpoint.chat_url, content=content, headers=endpoint.headers, timeout=timeout
            ) as response:
                # What may end up in an error has neither the key nor the prompt.
                bare = httpx.Response(response.status_code, headers=_headers(response, endpoint), request=request_to(endpoint))
                kind = response.headers.get("content-type", "")
                if response.status_code != 200:
                    text = await error_text(response)
                    failure = _reread(run, failures.from_response(bare, text, endpoint.api_key), text)
                elif "json" in kind or "html" in kind:
                    failure = _take_whole(run, await read_body(response, MAX_EVENT_BYTES), bare)
                else:
                    failure = await _take_stream(run, response, bare, scope)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            failure = failures.from_exception(error, endpoint.address, life.tokens > 0, endpoint.api_key)
        except BodyTooLarge as error:
            failure = broken(str(error))
        finally:
            stalls.end()
            if watcher is not None:
                watcher.cancel()
    if scope.cancelled_caught:
        failure = run.death or life.expire(anyio.current_time())
    # What comes after the finish_reason (usage, [DONE]) is welcome, but the answer does not hang on it.
    return _end(answer, "the answer ended") if answer.finish_reason is not None else failure


def _headers(response: httpx.Response, endpoint: Endpoint) -> list[tuple[bytes, bytes]]:
    """Without the key, which a server may send back."""
    key = endpoint.api_key.encode("utf-8", "replace")
    held = len(key) >= SECRET
    return [(name, value.replace(key, b"***") if held else value) for name, value in response.headers.raw]


async def _watch(run: Run, scope: anyio.CancelScope) -> None:
    """Looks after a silent server beside the attempt: what proves work extends the deadline, what proves death ends it."""
    life = run.life

    def proof(loading: bool) -> None:
        life.work(anyio.current_time())
        scope.deadline = life.deadline
        if events.wanted(events.Working):
            events.publish(events.Working(run.info))
        if loading and not run.told_loading:
            run.told_loading = True
            run.tell_wait("the server loads the model", scope.deadline - anyio.current_time(), loading=True)

    def silence() -> float:
        return life.silence(anyio.current_time())

    run.death = await watch(run.server, run.call.endpoint, silence, proof, scale=run.time_scale)
    scope.cancel()


class _TellStalls:
    """Tells of an answer that does not go on, every ten seconds as long as that lasts."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._every = max(_STALLED / run.time_scale, _LEAST_STALLED)
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._every, self._look)

    def _look(self) -> None:
        run, now = self._run, self._loop.time()
        silence = run.life.silence(now) if run.life.phase is Phase.DECODING else 0.0
        if silence >= self._every:
            events.publish(events.Stalled(run.info, silence, run.deadlines.stall))
            silence = 0.0
        self._timer = self._loop.call_later(self._every - silence, self._look)

    def end(self) -> None:
        self._timer.cancel()


async def _take_stream(
    run: Run, response: httpx.Response, bare: httpx.Response, scope: anyio.CancelScope
) -> Optional[Failure]:
    life, answer, decoder = run.life, run.answer, SSEDecoder()
    async for portion in pieces(response):
        now = anyio.current_time()
        try:
            events_data = decoder.feed(portion)
        except EventTooLarge as error:
            return broken(str(error))
        for data in events_data:
            if data == b"[DONE]":
                return _end(answer, "the stream ended with [DONE]")
            failure = _take_event(run, data, bare, now)
            if failure is not None:
                return failure
        if decoder.comments != life.comments:
            life.comments = decoder.comments
            progress = run.server.progress_of_comment(decoder.comment)
            if progress is not None:
                _progress(run, progress, now)
        scope.deadline = life.deadline
    for data in decoder.close():
        if data != b"[DONE]":
            failure = _take_event(run, data, bare, anyio.current_time())
            if failure is not None:
                return failure
    return _end(answer, "the stream ended")


def _take_event(run: Run, data: bytes, bare: httpx.Response, now: float) -> Optional[Failure]:
    """One event of a stream, or the one object of an answer that is none."""
    answer, life = run.answer, run.life
    try:
        chunk = chunk_of(data)
        if chunk is None:
            return None
        if chunk.get("error"):
            failure = failures.from_error_body(chunk, bare.request, run.call.endpoint.api_key)
            return _reread(run, failure, data.decode("utf-8", "replace"))
        is_token, text = answer.add(chunk)
    except OddChunk as error:
        return broken(str(error))
    if is_token:
        life.token(now)
        run.record.received(answer)
        if events.wanted(events.Token):
            events.publish(events.Token(run.info, answer.tokens, text))
        if text:
            run.show(text)
    elif life.phase is not Phase.DECODING:
        progress = run.server.progress(chunk)
        if progress is not None:
            _progress(run, progress, now)
    if answer.finish_reason is not None:
        life.finish(now)
    return None


def _reread(run: Run, failure: Failure, text: str) -> Failure:
    keyed = "authorization" in run.call.endpoint.headers
    return run.server.reread(failure, text, anyio.current_time() - run.life.sent_at, keyed)


def _progress(run: Run, progress: Progress, now: float) -> None:
    run.life.progress(progress.processed, now)
    total = progress.total or run.prompt_tokens
    events.publish(events.Prefill(run.info, progress.processed, max(progress.processed, total)))


def _take_whole(run: Run, body: bytes, bare: httpx.Response) -> Optional[Failure]:
    """A server that ignores ``stream`` and answers with one JSON object."""
    now, head = anyio.current_time(), body.lstrip()[:5]
    if head.startswith(b"<"):
        return Failure(
            Kind.FATAL, errors.WrongAddress, f"{bare.request.url} answers with a web page",
            "base_url must be the address of the OpenAI API; it usually ends in /v1.", "llm.base_url",
        )  # fmt: skip
    if head in (b"data:", b"event"):  # a stream under a wrong name
        decoder = SSEDecoder()
        data = [*decoder.feed(body), *decoder.close()]
    else:
        data = [body]
    for event in data:
        if event != b"[DONE]":
            failure = _take_event(run, event, bare, now)
            if failure is not None:
                return failure
    return _end(run.answer, "the answer ended")


def _end(answer: Answer, how: str) -> Optional[Failure]:
    """What the end of a stream means: only a finish_reason makes the answer whole."""
    if answer.failed:
        return broken(f"the server gave up: it ended the answer with the finish_reason '{answer.finish_reason}'")
    if answer.finish_reason is not None:
        return None
    if answer.tokens > answer.begun_tokens:
        return broken(f"{how} without a finish_reason: the answer is cut")
    return broken(f"{how} without a token and without a finish_reason")


def broken(what: str) -> Failure:
    remedy = "Look at the server's own log: it may have crashed, or another request interrupted it."
    return Failure(Kind.TRANSIENT, errors.IncompleteStream, what, remedy, "llm.local.retry.attempts")
