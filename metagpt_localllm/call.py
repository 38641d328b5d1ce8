"""One call from MetaGPT's messages to a whole answer: the one way through this package.

    choose the tier → identify the server → fit the context → wait for a turn → plan the deadlines → send
    → read the stream, and look after the server when it is silent → learn → retry or return

The decisions are pure and live elsewhere (``tiers``, ``deadlines``, ``trimming``, ``failures``,
``lifecycle``); this module does the I/O around them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
from dataclasses import dataclass
from typing import Any, AsyncIterator, Callable, Mapping, NoReturn, Optional, Sequence

import anyio
import httpx
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion
from tenacity import RetryCallState, wait_random_exponential

from metagpt_localllm import errors, events, failures, latency, servers
from metagpt_localllm.answer import Answer
from metagpt_localllm.concurrency import gate_for
from metagpt_localllm.deadlines import Deadlines, plan_deadlines
from metagpt_localllm.events import CallInfo
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.history import history_of
from metagpt_localllm.lifecycle import BackOff, CallLife, GiveUp, Phase, SendAgain, WaitForServer
from metagpt_localllm.servers import Identified, Server
from metagpt_localllm.settings import Backoff, LocalSettings
from metagpt_localllm.sse import MAX_EVENT_BYTES, EventTooLarge, SSEDecoder
from metagpt_localllm.tiers import Caller, choose_tier
from metagpt_localllm.tokens import MESSAGE_TOKENS, estimate_message, estimate_prompt, estimate_text
from metagpt_localllm.transport import Endpoint, client_for
from metagpt_localllm.trimming import Fitted, fit
from metagpt_localllm.watch import watch

__all__ = ["DEFAULT_WINDOW", "Call", "Outcome", "complete"]

#: Tokens assumed where neither the server nor the configuration names the context window.
DEFAULT_WINDOW = 4096

#: Bytes of an error's body that are read.
_MAX_ERROR_BYTES = 1 << 20

#: The time-out that counts for a deadline that has none of its own.
_ENDED_BY = {"progress": "first_token"}
#: Prompt tokens between two signs of prefill progress, at the most (llama.cpp's default n_batch).
_BATCH = 2048
#: Seconds that a deadline has at the least in scaled time: this machine's own hiccups are not scaled.
_LEAST_SCALED = 0.5

_numbers = itertools.count(1)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """All that one call needs.

    Attributes:
        endpoint: the server and model.
        settings: ``llm.local``.
        body: the request in OpenAI's form, without ``stream``; ``max_tokens`` is the most wanted.
        caller: who asks.
        context_length: ``llm.context_length`` in tokens, or None.
        attempt_cap: ``llm.timeout`` in seconds where the user set it.
        call_timeout: limit of the whole call in seconds where its caller set one.
        show: takes text as it comes.
    """

    endpoint: Endpoint
    settings: LocalSettings
    body: dict[str, Any]
    caller: Caller
    context_length: Optional[int] = None
    attempt_cap: Optional[float] = None
    call_timeout: Optional[float] = None
    show: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Outcome:
    """A whole answer."""

    text: str
    reasoning: str
    completion: ChatCompletion
    usage: CompletionUsage


@dataclass(frozen=True)
class _Prompt:
    """A request made ready: the same bytes for every attempt."""

    content: bytes
    messages: Sequence[Mapping[str, Any]]
    tokens: int
    max_tokens: int
    estimate: int


class _Run:
    """What the steps of one call share."""

    def __init__(self, call: Call) -> None:
        settings, endpoint, tools = call.settings, call.endpoint, call.body.get("tools")
        self.call = call
        self.server: Server = servers.UNKNOWN
        self.history = history_of(endpoint)
        self.estimate = estimate_prompt(call.body["messages"], tools)
        self.tier = choose_tier(
            settings.tiers, call.caller, model=endpoint.model, prompt_tokens=self.estimate, has_tools=bool(tools)
        )
        self.time_scale = _time_scale()
        self.deadlines = plan_deadlines(settings.timeouts, self.tier, call.attempt_cap)
        backoff = settings.retry.backoff
        self.life = CallLife(
            self.deadlines,
            attempts=settings.retry.attempts,
            wait_for_server=settings.retry.wait_for_server,
            backoff=_full_jitter(backoff),
            poll=(backoff.initial, backoff.max),
            now=anyio.current_time(),
            call_timeout=call.call_timeout,
        )
        self.info = CallInfo(next(_numbers), endpoint.model, call.caller, self.deadlines.tier)
        self.answer = Answer()
        self.shared_tokens = 0
        self.counts = True  # until a count of the server's has failed
        self.alone = False  # until the server has run out of the context that its slots share
        self.death: Optional[Failure] = None  # the proof that the server has lost this request
        self.scope = anyio.CancelScope(deadline=self.life.call_end)

    def plan(self, prompt: _Prompt) -> Deadlines:
        """The deadlines of the next attempt, by what has been learned until now."""
        estimator, now = self.history.estimator, anyio.current_time()
        self.shared_tokens = self.history.shared_tokens(prompt.messages)
        cached = estimator.cached_tokens(prompt.tokens, self.shared_tokens)
        may_load = self.server.facts.loaded is not True and self.history.may_load(now)
        new = prompt.tokens - cached
        batch = min(new, _BATCH)
        estimates = {
            "first_token": estimator.first_token(new, cached_tokens=cached, may_load=may_load),
            "progress": estimator.first_token(batch, cached_tokens=prompt.tokens - batch, may_queue=False),
            "stall": estimator.stall(),
            "total": estimator.total(new, prompt.max_tokens, cached_tokens=cached, may_load=may_load),
        }
        learned = {}
        for name, limits in latency.DEFAULTS.items():
            if self.time_scale != 1.0:
                scale = self.time_scale
                floor = max(limits.floor / scale, _LEAST_SCALED)
                limits = latency.Limits(floor, limits.ceiling / scale, limits.cold / scale, limits.margin)
            learned[name] = latency.deadline(name, estimates[name], limits, backoff=estimator.backoff(_ENDED_BY.get(name, name)))
        call = self.call
        return plan_deadlines(call.settings.timeouts, self.tier, call.attempt_cap, learned)

    def show(self, text: str) -> None:
        """Shows text to whoever streams. What goes wrong there (a console that cannot encode it) is no fault of the answer."""
        try:
            self.call.show(text)
        except Exception:
            _log.debug("the answer could not be shown", exc_info=True)


async def complete(call: Call) -> Outcome:
    """Asks until the answer is whole.

    Raises:
        LocalLLMError: one of its subclasses, when the attempts, the time or the remedies are used up.
    """
    run = _Run(call)
    with run.scope:
        return await _until_whole(run)
    _give_up(run, run.life.expire(anyio.current_time()))


async def _until_whole(run: _Run) -> Outcome:
    call, life = run.call, run.life
    if (await _identify(run)).hung:
        life.spend_attempt()
    prompt = await _prepare(run, run.server)

    while True:
        async with _turn(run):
            deadlines = run.deadlines = run.plan(prompt)
            life.send(anyio.current_time(), deadlines)
            events.publish(
                events.Sent(
                    run.info, life.attempt, prompt.tokens, deadlines.first_token, deadlines.stall, deadlines.total,
                    deadlines.why,
                )
            )  # fmt: skip
            run.answer, run.death = Answer(), None
            run.history.sent(prompt.messages)
            failure = await _attempt(run, prompt.content)
        _record(run, prompt, failure)
        if failure is None:
            try:
                outcome = _outcome(run, prompt)
                break
            except (ValueError, TypeError) as error:
                failure = _broken(f"the answer is no chat completion ({type(error).__name__})")
        step = life.fail(failure, anyio.current_time())
        if isinstance(step, GiveUp):
            _give_up(run, step.failure)
        run.alone = run.alone or failure.alone
        if run.answer.content:
            run.show("\n[the answer broke off; trying again]\n")
        if isinstance(step, BackOff):
            events.publish(events.Retry(run.info, life.attempt, failure.error.__name__, failure.what, step.delay))
            await anyio.sleep(step.delay)
        elif isinstance(step, WaitForServer):
            events.publish(events.Waiting(run.info, failure.what, step.until - anyio.current_time()))
            if not await servers.wait_until_up(call.endpoint, step.until, step.pause):
                _give_up(run, life.waited_in_vain(failure, anyio.current_time()).failure)
            servers.forget(call.endpoint, restarted=True)
            run.history.forget_prompts()
            await _identify(run)
            prompt = await _prepare(run, run.server)
        elif isinstance(step, SendAgain):
            events.publish(events.Retry(run.info, life.attempt, failure.error.__name__, failure.what, 0.0))
            if failure.kind is Kind.STRICT:
                servers.mark_strict(call.endpoint)
            else:
                _learn(call, failure, prompt)
                servers.forget(call.endpoint)
            await _identify(run)
            prompt = await _prepare(run, run.server)

    life.whole()
    run.show("\n")
    usage = outcome.usage
    events.publish(
        events.Done(
            run.info, life.attempt, usage.prompt_tokens, usage.completion_tokens, str(run.answer.finish_reason),
            life.ttft, life.longest_gap, anyio.current_time() - life.started,
        )
    )  # fmt: skip
    return outcome


async def _identify(run: _Run) -> Identified:
    """Finds out what the server is, and lets it load its model where a request that gave up would abort the load."""
    call = run.call
    identified = await servers.identify(call.endpoint, call.settings.server)
    run.server = identified.server
    if run.server.facts.loaded is False:
        async with _turn(run):  # one call loads it for all that begin together
            run.server = (await servers.identify(call.endpoint, call.settings.server)).server
            if run.server.facts.loaded is False:
                limit = run.deadlines.total
                events.publish(events.Waiting(run.info, f"the model {call.endpoint.model} is being loaded", limit))
                await servers.load(run.server, call.endpoint, limit)
                run.server = (await servers.identify(call.endpoint, call.settings.server)).server
    return identified


@contextlib.asynccontextmanager
async def _turn(run: _Run) -> AsyncIterator[None]:
    """Waits for a place at the server; the time counts against no deadline, not even the caller's."""
    call, gate = run.call, gate_for(run.call.endpoint.base_url)
    configured = call.settings.concurrency
    gate.places = run.server.places if configured == "auto" else configured
    ahead, since = gate.running + gate.waiting, anyio.current_time()
    if ahead >= gate.places:
        events.publish(events.Queued(run.info, ahead))
    run.scope.deadline = math.inf
    async with gate.turn(str(call.caller), alone=run.alone):
        run.life.queued(anyio.current_time() - since)
        run.scope.deadline = run.life.call_end
        yield


#: The deadline that each time-out is the end of.
_CENSORED: Mapping[type[errors.LocalLLMError], str] = {
    errors.FirstTokenTimeout: "first_token",
    errors.StreamStalled: "stall",
    errors.TotalTimeout: "total",
}


def _record(run: _Run, prompt: _Prompt, failure: Optional[Failure]) -> None:
    """What the attempt teaches about the server's speed; nothing where it never came to work."""
    life, answer = run.life, run.answer
    censored = _CENSORED.get(failure.error) if failure is not None and failure.kind is Kind.TRANSIENT else None
    if not answer.tokens and censored is None:
        return
    now = anyio.current_time()
    told = run.server.timings({"usage": answer.usage, "timings": answer.timings})
    counted = (answer.usage or {}).get("prompt_tokens")
    decoding = life.first_token_at is not None and life.last_token_at is not None
    run.history.record(
        latency.Sample(
            prompt_tokens=counted if isinstance(counted, int) and counted > 0 else prompt.tokens,
            cached_tokens=told.cached_tokens,
            shared_tokens=run.shared_tokens,
            ttft=life.ttft,
            waited=told.load or 0.0,
            prefill_seconds=told.prefill,
            answer_tokens=answer.tokens,
            decode_seconds=(life.last_token_at or 0.0) - (life.first_token_at or 0.0) if decoding else None,
            longest_gap=life.longest_gap or None,
            censored=censored,
            elapsed=now - life.sent_at if censored == "total" else life.silence(now),
            attempt=life.attempt,
            load=run.server.facts.loaded is False,
        ),
        now,
    )


def _time_scale() -> float:
    """How many times faster than real the time of the server passes, for simulations: what ``auto`` means is divided by it."""
    try:
        scale = float(os.environ.get("METAGPT_LOCALLLM_TIME_SCALE", "1"))
    except ValueError:
        return 1.0
    return scale if 0 < scale < math.inf else 1.0


def _outcome(run: _Run, prompt: _Prompt) -> Outcome:
    answer = run.answer
    usage = answer.completion_usage(prompt.tokens, estimate_text(answer.content) + estimate_text(answer.reasoning))
    return Outcome(answer.content, answer.reasoning, answer.completion(run.call.endpoint.model, usage), usage)


# ------------------------------------------------------------------------------------------ the context


def _window(call: Call, server: Server) -> Optional[int]:
    """Tokens; None where the server did not even answer the question, so that nothing is cut on a guess."""
    configured = call.settings.context.window
    window: Optional[int]
    if configured != "auto":
        window = configured
    else:
        usual = None if server is servers.UNKNOWN else server.usual_window or DEFAULT_WINDOW
        window = server.facts.window or call.context_length or usual
    taught = servers.learned(call.endpoint).window
    return window if taught is None else min(taught, window or taught)


def window_is_a_guess(call: Call) -> bool:
    """Whether nobody has said how large the context window is."""
    server = servers.known(call.endpoint)
    return (
        call.settings.context.window == "auto" and server is not None and not server.facts.window
        and not call.context_length and servers.learned(call.endpoint).window is None
    )  # fmt: skip


async def _prepare(run: _Run, server: Server) -> _Prompt:
    """Fits the messages into the window less the reserve, and ``max_tokens`` into what remains."""
    call, body = run.call, dict(run.call.body)
    window, scale = _window(call, server), servers.learned(call.endpoint).scale
    wanted = int(body.pop("max_tokens", None) or (window or DEFAULT_WINDOW) // 4)
    estimate, tokens = run.estimate, math.ceil(run.estimate * scale)
    # No token is shorter than a byte, so most prompts need no counting.
    if window is not None and (scale != 1.0 or _bytes_bound(body) + wanted > window):
        configured = call.settings.context.reserve
        reserve = min(wanted, window // 4) if configured == "auto" else configured
        budget = window - reserve
        counted = await _count(run, server, body)
        tokens = counted if counted is not None else tokens
        if tokens > budget:
            fitted, tokens = await _trim(run, server, body, budget, tokens / estimate)
            body["messages"] = fitted.messages
            estimate = estimate_prompt(fitted.messages, body.get("tools"))
            events.publish(
                events.Trimmed(run.info, fitted.dropped, fitted.shortened, fitted.removed_tokens, tokens, window)
            )
            if tokens > budget:
                if not window_is_a_guess(call):
                    _refuse(run, tokens, budget, window, reserve)
                window = None  # let the server decide
    body["max_tokens"] = wanted if window is None else max(1, min(wanted, window - tokens))
    body["stream"] = True
    if not servers.is_strict(call.endpoint):
        body.update(server.extras())
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")
    return _Prompt(content, body["messages"], tokens, body["max_tokens"], estimate)


async def _count(run: _Run, server: Server, body: Mapping[str, Any]) -> Optional[int]:
    """The server's own count; None where it does not count, or has just failed to."""
    if not run.counts:
        return None
    counted = await servers.count_tokens(server, run.call.endpoint, body)
    run.counts = counted is not None
    return counted


async def _trim(
    run: _Run, server: Server, body: Mapping[str, Any], budget: int, scale: float
) -> tuple[Fitted, int]:
    """Trims by the scaled estimate, and checks by the server's count where there is one."""
    frame = estimate_prompt([], body.get("tools"))
    for _ in range(4):

        def count(message: Mapping[str, Any], scale: float = scale) -> int:
            return math.ceil(estimate_message(message) * scale)

        fitted = fit(body["messages"], budget - math.ceil(frame * scale), count)
        estimated = fitted.tokens + math.ceil(frame * scale)
        counted = await _count(run, server, {**body, "messages": fitted.messages})
        tokens = counted if counted is not None else estimated
        if tokens <= budget or not fitted.fits:
            break
        # What remains is denser than the whole was: estimate it by its own measure.
        scale *= 1.01 * tokens / estimated
    return fitted, tokens


def _bytes_bound(body: Mapping[str, Any]) -> int:
    """Tokens that the prompt has at the most: one per byte, and the template's around each message."""
    total = MESSAGE_TOKENS
    for message in body["messages"]:
        content = message.get("content")
        if not isinstance(content, str) or len(message) > 2:
            return 1 << 60
        total += len(content.encode("utf-8", "replace")) + 2 * MESSAGE_TOKENS
    return total if not body.get("tools") else 1 << 60


def _learn(call: Call, failure: Failure, prompt: _Prompt) -> None:
    """What an overflow teaches: the server's window and its count, or at least that ours was too low."""
    taught = servers.learned(call.endpoint)
    news = failure.window is not None and failure.window != taught.window
    if failure.window is not None:
        taught.window = failure.window
    if failure.prompt_tokens is not None and prompt.estimate > 0:
        taught.scale = max(taught.scale, failure.prompt_tokens / prompt.estimate)
    elif not news:
        taught.scale *= 1.5
    if taught.scale == 1.0:
        taught.scale = 1.0001  # so that the prompt is counted from now on


def _refuse(run: _Run, tokens: int, budget: int, window: int, reserve: int) -> NoReturn:
    what = (
        f"the prompt has {tokens:,} tokens even when trimmed, and the context window of {window:,} "
        f"leaves {budget:,} beside {reserve:,} reserved for the answer"
    )
    remedy = "Load the model with a larger context, or ask for shorter answers (llm.max_token)."
    _give_up(run, Failure(Kind.FATAL, errors.ContextOverflow, what, remedy, "llm.local.context.window"))


# ------------------------------------------------------------------------------------------ one attempt


async def _attempt(run: _Run, content: bytes) -> Optional[Failure]:
    """Sends the request and reads the answer; None when it is whole. The connection is closed whatever happens."""
    failure: Optional[Failure] = None
    endpoint, answer, life = run.call.endpoint, run.answer, run.life
    timeout = httpx.Timeout(None, connect=run.deadlines.connect)
    with anyio.CancelScope(deadline=life.deadline) as scope:
        watcher = asyncio.ensure_future(_watch(run, scope))
        try:
            async with client_for(endpoint).stream(
                "POST", endpoint.chat_url, content=content, headers=endpoint.headers, timeout=timeout
            ) as response:
                # What may end up in an error has neither the key nor the prompt.
                bare = httpx.Response(response.status_code, headers=response.headers, request=_request(endpoint))
                kind = response.headers.get("content-type", "")
                if response.status_code != 200:
                    failure = failures.from_response(bare, await _read(response, _MAX_ERROR_BYTES))
                elif "json" in kind or "html" in kind:
                    failure = _take_whole(run, await _read(response, MAX_EVENT_BYTES), bare)
                else:
                    failure = await _take_stream(run, response, bare, scope)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            failure = failures.from_exception(error, endpoint.address, answer.tokens > 0)
        finally:
            watcher.cancel()
    if scope.cancelled_caught:
        failure = run.death or life.expire(anyio.current_time())
    # What comes after the finish_reason (usage, [DONE]) is welcome, but the answer does not hang on it.
    return _end(answer, "the answer ended") if answer.finish_reason is not None else failure


async def _watch(run: _Run, scope: anyio.CancelScope) -> None:
    """Looks after a silent server beside the attempt: what proves work extends the deadline, what proves death ends it."""
    life = run.life

    def proof() -> None:
        life.work(anyio.current_time())
        scope.deadline = life.deadline

    def silence() -> float:
        return life.silence(anyio.current_time())

    run.death = await watch(run.server, run.call.endpoint, silence, proof, scale=run.time_scale)
    scope.cancel()


def _request(endpoint: Endpoint) -> httpx.Request:
    return httpx.Request("POST", endpoint.address.rstrip("/") + "/chat/completions")


async def _read(response: httpx.Response, limit: int) -> str:
    """A body as text, of at most ``limit`` bytes."""
    body = bytearray()
    async for portion in response.aiter_bytes():
        body += portion
        if len(body) > limit:
            break
    return bytes(body[:limit]).decode("utf-8", "replace")


async def _take_stream(
    run: _Run, response: httpx.Response, bare: httpx.Response, scope: anyio.CancelScope
) -> Optional[Failure]:
    life, answer, decoder = run.life, run.answer, SSEDecoder()
    # Undecoded where possible: a decompressor costs time and may hold tokens back.
    portions = response.aiter_bytes() if "content-encoding" in response.headers else response.aiter_raw()
    async for portion in portions:
        now = anyio.current_time()
        try:
            events_data = decoder.feed(portion)
        except EventTooLarge as error:
            return _broken(str(error))
        for data in events_data:
            if data == b"[DONE]":
                return _end(answer, "the stream ended with [DONE]")
            failure = _take_event(run, data, bare, now)
            if failure is not None:
                return failure
        if decoder.comments != life.comments:
            life.comments = decoder.comments
            processed = run.server.progress_of_comment(decoder.comment)
            if processed is not None:
                life.progress(processed, now)
        scope.deadline = life.deadline
    for data in decoder.close():
        if data != b"[DONE]":
            failure = _take_event(run, data, bare, anyio.current_time())
            if failure is not None:
                return failure
    return _end(answer, "the stream ended")


def _take_event(run: _Run, data: bytes, bare: httpx.Response, now: float) -> Optional[Failure]:
    """One event of a stream, or the one object of an answer that is none."""
    answer, life = run.answer, run.life
    try:
        chunk = json.loads(data.decode("utf-8", "replace"))
        if not isinstance(chunk, dict):
            return None
        if chunk.get("error"):
            return failures.from_error_body(chunk, bare.request)
        is_token, text = answer.add(chunk)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        return _broken(f"the stream holds something that is no chat chunk ({type(error).__name__}: {str(error)[:100]})")
    if is_token:
        life.token(now)
        if text:
            run.show(text)
    elif life.phase is not Phase.DECODING:
        processed = run.server.progress(chunk)
        if processed is not None:
            life.progress(processed, now)
    if answer.finish_reason is not None:
        life.finish(now)
    return None


def _take_whole(run: _Run, text: str, bare: httpx.Response) -> Optional[Failure]:
    """A server that ignores ``stream`` and answers with one JSON object."""
    now, head = anyio.current_time(), text.lstrip()[:5]
    if head.startswith("<"):
        return Failure(
            Kind.FATAL, errors.WrongAddress, f"{bare.request.url} answers with a web page",
            "base_url must be the address of the OpenAI API; it usually ends in /v1.", "llm.base_url",
        )  # fmt: skip
    if head in ("data:", "event"):  # a stream under a wrong name
        decoder = SSEDecoder()
        data = [*decoder.feed(text.encode()), *decoder.close()]
    else:
        data = [text.encode()]
    for event in data:
        if event != b"[DONE]":
            failure = _take_event(run, event, bare, now)
            if failure is not None:
                return failure
    return _end(run.answer, "the answer ended")


def _end(answer: Answer, how: str) -> Optional[Failure]:
    """What the end of a stream means: only a finish_reason makes the answer whole."""
    if answer.failed:
        return _broken(f"the server gave up: it ended the answer with the finish_reason '{answer.finish_reason}'")
    if answer.finish_reason is not None:
        return None
    if answer.tokens:
        return _broken(f"{how} without a finish_reason: the answer is cut")
    return _broken(f"{how} without a token and without a finish_reason")


def _broken(what: str) -> Failure:
    remedy = "Look at the server's own log: it may have crashed, or another request interrupted it."
    return Failure(Kind.TRANSIENT, errors.IncompleteStream, what, remedy, "llm.local.retry.attempts")


# ------------------------------------------------------------------------------------------ the end


def _full_jitter(backoff: Backoff) -> Callable[[int], float]:
    """A random pause up to initial × 2ⁿ (tenacity's wait_random_exponential)."""
    wait = wait_random_exponential(multiplier=backoff.initial, max=backoff.max)

    def pause(attempt: int) -> float:
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
        state.attempt_number = attempt
        return float(wait(state))

    return pause


def _give_up(run: _Run, failure: Failure) -> NoReturn:
    life, answer = run.life, run.answer
    elapsed = anyio.current_time() - life.started
    attempts = run.call.settings.retry.attempts
    where = f"{run.call.caller}, tier '{run.info.tier}', attempt {max(life.attempt, 1)} of {attempts}"
    parts = [f"{failure.what} [{where}; {answer.tokens} tokens received; {elapsed:.1f} s in all]."]
    if failure.remedy:
        parts.append(failure.remedy)
    if failure.setting:
        parts.append(f"Setting in config2.yaml: {failure.setting}.")
    message = " ".join(parts)
    events.publish(events.Failed(run.info, life.attempt, failure.error.__name__, message, elapsed))
    request = _request(run.call.endpoint)
    if isinstance(failure.cause, httpx.RequestError):
        failure.cause.request = request  # httpx's own has the key and the prompt
    raise failure.error(
        message[:1].upper() + message[1:],
        request=request,
        response=failure.response,
        partial=answer.content,
        attempts=life.attempt,
        setting=failure.setting,
    ) from failure.cause
