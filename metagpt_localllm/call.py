"""One call from MetaGPT's messages to a whole answer: the one way through this package.

    identify the server → choose the tier → fit the context → send → read the stream → retry or return

The decisions are pure and live elsewhere (``tiers``, ``deadlines``, ``trimming``, ``failures``,
``lifecycle``); this module does the I/O around them.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Mapping, NoReturn, Optional, Union

import anyio
import httpx
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion
from tenacity import RetryCallState, wait_random_exponential

from metagpt_localllm import errors, events, failures, servers
from metagpt_localllm.answer import Answer
from metagpt_localllm.deadlines import Deadlines, plan_deadlines
from metagpt_localllm.events import CallInfo
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.lifecycle import BackOff, CallLife, GiveUp, Phase, SendAgain, WaitForServer
from metagpt_localllm.servers import Server
from metagpt_localllm.settings import Backoff, LocalSettings
from metagpt_localllm.sse import EventTooLarge, SSEDecoder
from metagpt_localllm.tiers import Caller, choose_tier
from metagpt_localllm.tokens import MESSAGE_TOKENS, estimate_message, estimate_prompt, estimate_text
from metagpt_localllm.transport import Endpoint, client_for
from metagpt_localllm.trimming import Fitted, fit

__all__ = ["DEFAULT_WINDOW", "Call", "Outcome", "complete"]

#: Tokens assumed where neither the server nor the configuration names the context window.
DEFAULT_WINDOW = 4096

_numbers = itertools.count(1)


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
    tokens: int
    fitted: Optional[Fitted] = None


@dataclass
class _Measure:
    """How the estimate of tokens relates to what the server counts, and how large its window is."""

    window: int
    scale: float = 1.0


async def complete(call: Call) -> Outcome:
    """Asks until the answer is whole.

    Raises:
        LocalLLMError: one of its subclasses, when the attempts, the time or the remedies are used up.
    """
    settings, endpoint = call.settings, call.endpoint
    identified = await servers.identify(endpoint)
    estimate = estimate_prompt(call.body["messages"], call.body.get("tools"))
    tier = choose_tier(
        settings.tiers, call.caller, model=endpoint.model, prompt_tokens=estimate, has_tools=bool(call.body.get("tools"))
    )
    deadlines = plan_deadlines(settings.timeouts, tier, call.attempt_cap)
    life = CallLife(
        deadlines,
        attempts=settings.retry.attempts,
        wait_for_server=settings.retry.wait_for_server,
        backoff=_full_jitter(settings.retry.backoff),
        now=anyio.current_time(),
        call_timeout=call.call_timeout,
    )
    info = CallInfo(next(_numbers), endpoint.model, call.caller, deadlines.tier)
    if identified.hung:
        life.spend_attempt()
    measure = _Measure(_window(call, identified.server))
    answer = Answer()
    prompt = await _prepare(call, info, identified.server, measure, life)

    while True:
        life.send(anyio.current_time())
        events.publish(events.Sent(info, life.attempt, prompt.tokens))
        answer = Answer()
        failure = await _attempt(call, deadlines, prompt.content, life, answer)
        if failure is None:
            break
        step = life.fail(failure, anyio.current_time())
        if isinstance(step, GiveUp):
            _give_up(call, info, life, step.failure, deadlines, answer)
        if answer.content:
            call.show("\n[the answer broke off; trying again]\n")
        if isinstance(step, BackOff):
            events.publish(events.Retry(info, life.attempt, failure.error.__name__, failure.what, step.delay))
            await anyio.sleep(step.delay)
        elif isinstance(step, WaitForServer):
            limit = step.until - anyio.current_time()
            events.publish(events.Waiting(info, failure.what, limit))
            if not await servers.wait_until_up(endpoint, step.until, settings.retry.backoff.initial):
                given_up = life.waited_in_vain(_waited(failure, settings), anyio.current_time())
                _give_up(call, info, life, given_up.failure, deadlines, answer)
            identified = await servers.identify(endpoint)
            measure.window = _window(call, identified.server)
            prompt = await _prepare(call, info, identified.server, measure, life)
        elif isinstance(step, SendAgain):
            events.publish(events.Retry(info, life.attempt, failure.error.__name__, failure.what, 0.0))
            if failure.kind is Kind.STRICT:
                servers.mark_strict(endpoint)
            else:
                _learn(measure, failure, prompt, estimate)
            prompt = await _prepare(call, info, identified.server, measure, life)

    life.whole()
    call.show("\n")
    usage = answer.completion_usage(prompt.tokens, estimate_text(answer.content) + estimate_text(answer.reasoning))
    events.publish(
        events.Done(
            info, life.attempt, usage.prompt_tokens, usage.completion_tokens, str(answer.finish_reason),
            life.ttft, anyio.current_time() - life.started,
        )
    )  # fmt: skip
    return Outcome(answer.content, answer.reasoning, answer.completion(endpoint.model, usage), usage)


# ------------------------------------------------------------------------------------------ the context


def _window(call: Call, server: Server) -> int:
    configured = call.settings.context.window
    if configured != "auto":
        return configured
    return server.window or call.context_length or DEFAULT_WINDOW


def window_is_a_guess(call: Call) -> bool:
    """Whether nobody has said how large the context window is."""
    server = servers.known(call.endpoint)
    return call.settings.context.window == "auto" and not (server and server.window) and not call.context_length


async def _prepare(call: Call, info: CallInfo, server: Server, measure: _Measure, life: CallLife) -> _Prompt:
    """Fits the messages into the window less the reserve, and ``max_tokens`` into what remains."""
    body = dict(call.body)
    wanted = int(body.pop("max_tokens", None) or measure.window // 4)
    configured = call.settings.context.reserve
    reserve = min(wanted, measure.window // 4) if configured == "auto" else configured
    budget = measure.window - reserve
    fitted: Optional[Fitted] = None
    # No token is shorter than a byte, so most prompts need no counting.
    tokens = _bytes_bound(body)
    if measure.scale != 1.0 or tokens + wanted > measure.window:
        estimate = estimate_prompt(body["messages"], body.get("tools"))
        counted = await servers.count_tokens(server, call.endpoint, body)
        tokens = counted if counted is not None else math.ceil(estimate * measure.scale)
        if tokens > budget:
            fitted, tokens = await _trim(call, server, body, budget, tokens / estimate)
            body["messages"] = fitted.messages
            events.publish(
                events.Trimmed(
                    info, fitted.dropped, fitted.shortened, fitted.removed_tokens, tokens, measure.window
                )
            )  # fmt: skip
            if tokens > budget:
                _refuse(call, info, life, tokens, budget, measure.window, reserve)
    else:
        tokens = estimate_prompt(body["messages"], body.get("tools"))
    body["max_tokens"] = max(1, min(wanted, measure.window - tokens))
    body["stream"] = True
    if not servers.is_strict(call.endpoint):
        body["stream_options"] = {"include_usage": True}
        body.update(server.extras)
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")
    return _Prompt(content, tokens, fitted)


async def _trim(call: Call, server: Server, body: dict[str, Any], budget: int, scale: float) -> tuple[Fitted, int]:
    """Trims by the scaled estimate, and checks by the server's count where there is one."""
    messages = body["messages"]
    target = budget
    for _ in range(3):
        frame = MESSAGE_TOKENS + (estimate_prompt([], body["tools"]) if body.get("tools") else 0)

        def count(message: Mapping[str, Any], scale: float = scale) -> int:
            return math.ceil(estimate_message(message) * scale)

        fitted = fit(messages, target - math.ceil(frame * scale), count)
        trimmed = {**body, "messages": fitted.messages}
        counted = await servers.count_tokens(server, call.endpoint, trimmed)
        tokens = counted if counted is not None else fitted.tokens + math.ceil(frame * scale)
        if tokens <= budget or not fitted.fits:
            break
        target -= tokens - budget
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


def _learn(measure: _Measure, failure: Failure, prompt: _Prompt, estimate: int) -> None:
    """What an overflow tells: the server's window and its count, or at least that ours was too low."""
    if failure.window is not None:
        measure.window = min(failure.window, measure.window)
    before = estimate - (prompt.fitted.removed_tokens if prompt.fitted else 0)
    if failure.prompt_tokens is not None and before > 0:
        measure.scale = max(measure.scale, failure.prompt_tokens / before)
    elif failure.window is None:
        measure.scale *= 1.5
    if measure.scale == 1.0:
        measure.scale = 1.0001  # so that the prompt is counted this time


def _refuse(
    call: Call, info: CallInfo, life: CallLife, tokens: int, budget: int, window: int, reserve: int
) -> NoReturn:
    what = (
        f"the prompt has {tokens:,} tokens even when trimmed, and the context window of {window:,} "
        f"leaves {budget:,} beside {reserve:,} reserved for the answer"
    )
    remedy = "Load the model with a larger context, or ask for shorter answers (llm.max_token)."
    failure = Failure(Kind.FATAL, errors.ContextOverflow, what, remedy, "llm.local.context.window")
    deadlines = Deadlines(0, 0, 0, 0, info.tier, {})
    _give_up(call, info, life, failure, deadlines, Answer())


# ------------------------------------------------------------------------------------------ one attempt


async def _attempt(
    call: Call, deadlines: Deadlines, content: bytes, life: CallLife, answer: Answer
) -> Optional[Failure]:
    """Sends the request and reads the answer; None when it is whole. The connection is closed whatever happens."""
    failure: Optional[Failure] = None
    timeout = httpx.Timeout(None, connect=deadlines.connect)
    endpoint = call.endpoint
    with anyio.CancelScope(deadline=life.deadline) as scope:
        try:
            async with client_for(endpoint).stream(
                "POST", endpoint.chat_url, content=content, headers=endpoint.headers, timeout=timeout
            ) as response:
                kind = response.headers.get("content-type", "")
                if response.status_code != 200:
                    await response.aread()
                    failure = failures.from_response(response, response.text)
                elif "json" in kind or "html" in kind:
                    await response.aread()
                    failure = _take_whole(call, response, life, answer)
                else:
                    failure = await _take_stream(call, response, life, answer, scope)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            failure = failures.from_exception(error, endpoint.base_url, answer.tokens > 0)
    if scope.cancelled_caught:
        failure = life.expire(anyio.current_time())
    # What comes after the finish_reason (usage, [DONE]) is welcome, but the answer does not hang on it.
    return None if answer.finish_reason is not None else failure


async def _take_stream(
    call: Call, response: httpx.Response, life: CallLife, answer: Answer, scope: anyio.CancelScope
) -> Optional[Failure]:
    decoder = SSEDecoder()
    add, show, loads = answer.add, call.show, json.loads
    try:
        async for portion in response.aiter_raw():
            now = anyio.current_time()
            for data in decoder.feed(portion):
                if data == b"[DONE]":
                    return _cut_short(answer, "the stream ended with [DONE]")
                chunk = loads(data)
                if not isinstance(chunk, dict):
                    continue
                if chunk.get("error"):
                    return failures.from_error_body(chunk, response.request)
                is_token, text = add(chunk)
                if is_token:
                    life.token(now)
                    if text:
                        show(text)
                elif answer.progress is not None and life.phase is not Phase.DECODING:
                    life.progress(answer.progress[0], now)
            life.comments = decoder.comments
            scope.deadline = life.deadline
        for data in decoder.close():
            if data != b"[DONE]":
                chunk = loads(data)
                if isinstance(chunk, dict) and chunk.get("error"):
                    return failures.from_error_body(chunk, response.request)
                if isinstance(chunk, dict):
                    show(add(chunk)[1])
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, EventTooLarge) as error:
        return _broken(f"the stream holds something that is no chat chunk ({error})")
    return _cut_short(answer, "the stream ended")


def _take_whole(call: Call, response: httpx.Response, life: CallLife, answer: Answer) -> Optional[Failure]:
    """A server that ignores ``stream`` and answers with one JSON object."""
    try:
        body: Any = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        text = response.text
        if "html" in response.headers.get("content-type", "") or text.lstrip()[:1] == "<":
            return Failure(
                Kind.FATAL, errors.ModelNotFound, f"{call.endpoint.chat_url} answers with a web page",
                "base_url must be the address of the OpenAI API; it usually ends in /v1.", "llm.base_url",
            )  # fmt: skip
        return _broken("the answer is no JSON")
    if body.get("error"):
        return failures.from_error_body(body, response.request)
    try:
        is_token, text = answer.add(body)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return _broken(f"the answer is no chat completion ({error})")
    if is_token:
        life.token(anyio.current_time())
        call.show(text)
    return _cut_short(answer, "the answer ended")


def _cut_short(answer: Answer, how: str) -> Optional[Failure]:
    if answer.finish_reason is not None:
        return None
    if answer.tokens:
        return _broken(f"{how} without a finish_reason: the answer is cut")
    return _broken(f"{how} without a token and without a finish_reason")


def _broken(what: str) -> Failure:
    remedy = "Look at the server's own log: it may have crashed, or another request interrupted it."
    return Failure(Kind.TRANSIENT, errors.IncompleteStream, what, remedy, "llm.local.retry.attempts")


# ------------------------------------------------------------------------------------------ the end


def _waited(failure: Failure, settings: LocalSettings) -> Failure:
    return replace(failure, what=f"{failure.what}, not even after {settings.retry.wait_for_server:g} s of waiting")


def _full_jitter(backoff: Backoff) -> Callable[[int], float]:
    """A random pause up to initial × 2ⁿ (tenacity's wait_random_exponential)."""
    wait = wait_random_exponential(multiplier=backoff.initial, max=backoff.max)

    def pause(attempt: int) -> float:
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
        state.attempt_number = attempt
        return float(wait(state))

    return pause


def _give_up(
    call: Call, info: CallInfo, life: CallLife, failure: Failure, deadlines: Deadlines, answer: Answer
) -> NoReturn:
    now = anyio.current_time()
    elapsed = now - life.started
    where = f"{call.caller}, tier '{info.tier}', attempt {max(life.attempt, 1)} of {call.settings.retry.attempts}"
    parts = [f"{failure.what} [{where}; {answer.tokens} tokens received; {elapsed:.1f} s in all]."]
    if failure.remedy:
        parts.append(failure.remedy)
    if failure.setting:
        parts.append(f"Setting in config2.yaml: {failure.setting}.")
    message = " ".join(parts)
    events.publish(events.Failed(info, life.attempt, failure.error.__name__, message, elapsed))
    details: dict[str, Union[str, int, None]] = {
        "partial": answer.content, "attempts": life.attempt, "setting": failure.setting,
    }  # fmt: skip
    arguments: dict[str, Any] = dict(details)
    if failure.response is not None:
        arguments["response"] = failure.response
    elif failure.error is errors.ContextOverflow:
        arguments["response"] = httpx.Response(400, request=httpx.Request("POST", call.endpoint.chat_url))
    elif failure.error is errors.ModelNotFound:
        arguments["response"] = httpx.Response(404, request=httpx.Request("POST", call.endpoint.chat_url))
    # The request goes into the error without its headers and body: they hold the key and the prompt.
    raise failure.error(
        message[:1].upper() + message[1:], request=httpx.Request("POST", call.endpoint.chat_url), **arguments
    ) from failure.cause
