"""One call as it runs: what it was given, and what its steps share."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from dataclasses import dataclass, replace
from typing import Any, Callable, Mapping, NoReturn, Optional, Sequence

import anyio
import httpx
from tenacity import RetryCallState, wait_random_exponential

from metagpt_localllm import events, latency, servers
from metagpt_localllm.answer import Answer
from metagpt_localllm.deadlines import Deadlines, plan_deadlines
from metagpt_localllm.events import CallInfo
from metagpt_localllm.failures import Failure
from metagpt_localllm.history import history_of
from metagpt_localllm.lifecycle import CallLife
from metagpt_localllm.messages import Message
from metagpt_localllm.record import Record
from metagpt_localllm.servers import Identified, Server
from metagpt_localllm.servers.base import Timings
from metagpt_localllm.session import session_for
from metagpt_localllm.settings import Backoff, LocalSettings
from metagpt_localllm.tiers import Caller, choose_tier
from metagpt_localllm.tokenizer_file import load_tokenizer
from metagpt_localllm.tokens import estimate_text
from metagpt_localllm.transport import Endpoint

__all__ = ["Call", "Prompt", "Run", "encoded", "request_to", "time_scale"]

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
        compress_type: MetaGPT 1.0.0's setting of that name; it counts where ``context.policy`` is not set.
        show: takes text as it comes.
    """

    endpoint: Endpoint
    settings: LocalSettings
    body: dict[str, Any]
    caller: Caller
    context_length: Optional[int] = None
    attempt_cap: Optional[float] = None
    call_timeout: Optional[float] = None
    compress_type: str = ""
    show: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Prompt:
    """A request made ready: the same bytes for every attempt.

    Attributes:
        content: its body.
        messages: in it.
        counts: tokens of each of them.
        tokens: of the prompt; may be an estimate.
        max_tokens: of the answer, as it is asked for.
        wanted: of the answer, as the caller wants.
        window: context window in tokens that it was fitted to, or None.
        changed: messages left out of it or shortened, by this call or an earlier one.
    """

    content: bytes
    messages: Sequence[Message]
    counts: Sequence[float]
    tokens: int
    max_tokens: int
    wanted: int
    window: Optional[int]
    changed: int


class Run:
    """What the steps of one call share."""

    def __init__(self, call: Call) -> None:
        settings, endpoint, tools = call.settings, call.endpoint, call.body.get("tools")
        self.call = call
        self.server: Server = servers.UNKNOWN
        self.history = history_of(endpoint, settings.journal.path)
        named = settings.context.tokenizer
        self.chat = self.history.conversations.open(
            call.body["messages"], tools, load_tokenizer(named) if named else estimate_text,
            servers.learned(endpoint).scale,
        )  # fmt: skip
        self.tier = choose_tier(
            settings.tiers, call.caller, model=endpoint.model, prompt_tokens=self.chat.tokens, has_tools=bool(tools)
        )
        self.time_scale = time_scale()
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
        self.prompt_tokens = 0  # of the attempt that runs
        self.told_loading = False  # in the attempt that runs
        self.expected: Optional[float] = None  # seconds until the first token
        self.request = b""  # the body that the answer answers
        self.saved = 0  # tokens that were not decoded again
        self.record = Record(
            session_for(settings.journal), endpoint, call.body, call.caller, self.deadlines.tier, self.chat.parts,
            self.time_scale,
        )  # fmt: skip
        self.trims: list[events.Trimmed] = []
        self.truncated = 0  # times that the server seems to have cut a prompt of this call without a word
        self.first_answer: Optional[Answer] = None  # the one that was thrown away for it
        self.first_window: Optional[int] = None  # what had been learned of the window before
        self.alone = False  # until the server has run out of the context that its slots share
        self.death: Optional[Failure] = None  # the proof that the server has lost this request
        self.scope = anyio.CancelScope(deadline=self.life.call_end)

    async def identify(self) -> Identified:
        """Finds out what the server is, unless that is known."""
        identified = await servers.identify(self.call.endpoint, self.call.settings.server)
        self.server = identified.server
        return identified

    def plan(self, prompt: Prompt) -> Deadlines:
        """The deadlines of the next attempt, by what has been learned until now."""
        estimator, now = self.history.estimator, anyio.current_time()
        self.prompt_tokens, self.told_loading = prompt.tokens, False
        self.shared_tokens = self.history.shared_tokens(prompt.messages)
        cached = estimator.cached_tokens(prompt.tokens, self.shared_tokens)
        loaded = self.server.facts.loaded
        may_load = self.history.may_load(now) if loaded is None else not loaded
        new = prompt.tokens - cached
        batch = min(new, _BATCH)
        estimates = {
            "first_token": estimator.first_token(new, cached_tokens=cached, may_load=may_load),
            "progress": estimator.first_token(batch, cached_tokens=prompt.tokens - batch, may_queue=False),
            "stall": estimator.stall(),
            "total": estimator.total(new, prompt.max_tokens, cached_tokens=cached, may_load=may_load),
        }
        first = estimates["first_token"]
        self.expected = first.expected if first is not None else None
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

    def without_key(self, failure: Failure) -> Failure:
        """A server may quote the API key in its error."""
        return replace(failure, what=self.call.endpoint.without_key(failure.what))

    def timings(self) -> Timings:
        """How long the answer took by the server's own clock."""
        return self.server.timings({"usage": self.answer.usage, "timings": self.answer.timings})

    def tell_retry(self, failure: Failure, what: str, delay: float) -> None:
        attempts = self.call.settings.retry.attempts
        events.publish(events.Retry(self.info, self.life.attempt, attempts, failure.error.__name__, what, delay))

    def tell_wait(self, cause: str, limit: float, *, loading: bool) -> None:
        """``limit``: seconds."""
        if loading:
            events.publish(events.Loading(self.info, cause, limit, self.history.estimator.usual_load))
        else:
            events.publish(events.Waiting(self.info, cause, limit))

    def give_up(self, failure: Failure) -> NoReturn:
        """Ends the call with an error that says what happened, where, and what helps."""
        life, answer = self.life, self.answer
        elapsed = anyio.current_time() - life.started
        attempts = self.call.settings.retry.attempts
        where = f"{self.call.caller}, tier '{self.info.tier}', attempt {max(life.attempt, 1)} of {attempts}"
        parts = [f"{failure.what} [{where}; {answer.tokens} tokens received; {elapsed:.1f} s in all]."]
        if failure.remedy:
            parts.append(failure.remedy)
        if failure.setting:
            parts.append(f"Setting in config2.yaml: {failure.setting}.")
        message = " ".join(parts)
        events.publish(
            events.Failed(
                self.info, life.attempt, failure.error.__name__, message, elapsed, failure.what, failure.remedy,
                failure.setting or "", answer.tokens,
            )
        )  # fmt: skip
        request = request_to(self.call.endpoint)
        if isinstance(failure.cause, httpx.RequestError):
            failure.cause.request = request  # httpx's own has the key and the prompt
        cause = failure.cause
        if cause is not None and self.call.endpoint.without_key(str(cause)) != str(cause):
            cause = None  # it quotes the server, which has sent the key back
        raise failure.error(
            message[:1].upper() + message[1:],
            request=request,
            response=failure.response,
            partial=answer.content,
            attempts=life.attempt,
            setting=failure.setting,
        ) from cause


def encoded(body: Mapping[str, Any]) -> bytes:
    """A request's body as it is sent."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")


def request_to(endpoint: Endpoint) -> httpx.Request:
    return httpx.Request("POST", endpoint.address.rstrip("/") + "/chat/completions")


def time_scale() -> float:
    """How many times faster than real the time of the server passes, for simulations: what ``auto`` means is divided by it."""
    try:
        scale = float(os.environ.get("METAGPT_LOCALLLM_TIME_SCALE", "1"))
    except ValueError:
        return 1.0
    return scale if 0 < scale < math.inf else 1.0


def _full_jitter(backoff: Backoff) -> Callable[[int], float]:
    """A random pause up to initial × 2ⁿ (tenacity's wait_random_exponential)."""
    wait = wait_random_exponential(multiplier=backoff.initial, max=backoff.max)

    def pause(attempt: int) -> float:
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
        state.attempt_number = attempt
        return float(wait(state))

    return pause
