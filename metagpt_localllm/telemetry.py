"""OpenTelemetry: a span for each call, by the GenAI conventions. Imported only where ``llm.local.telemetry`` is on.

::

    chat codebooga-34b                      the whole call, with its retries and waits, as the conventions want it
    ├─ attempt 1   error.type=StreamStalled
    └─ attempt 2                            first_token

A call's span is the current one while it runs, so that what the application instruments (httpx, logging) comes below it, and
its parent is the one that was current when the call began. The attempts have spans of their own, since one takes minutes
here and the pause before the next may, too; they are INTERNAL and carry no ``gen_ai.*``, so that no token is counted twice.

What the events tell on the way (retries, waits, stalls …) becomes events of the span. All that has no name in the conventions
is below ``metagpt_localllm.``; times there are in seconds. Nothing is done per token, nor per proof that the server works.
Whatever fails in here harms no call.

What was asked and answered goes along with ``content: true`` only, and so do the words of errors: a server may quote the
prompt in them. API keys never do.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Optional

import anyio
from opentelemetry import context, metrics, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from metagpt_localllm import __version__, errors, events, genai, otlp, servers
from metagpt_localllm.genai import Attribute
from metagpt_localllm.lifecycle import Phase
from metagpt_localllm.servers.base import positive
from metagpt_localllm.settings import TelemetrySettings

if TYPE_CHECKING:
    from metagpt_localllm.run import Run

__all__ = ["span_of", "tell_by"]

_NAME = "metagpt_localllm"
#: Characters of a key from which on it is struck out of prompts and answers: those below are words, such as "ollama".
_SECRET = 12
#: In these an attempt waits for the server or reads its answer.
_UNDER_WAY = (Phase.SENT, Phase.PREFILL, Phase.DECODING, Phase.ENDING)
#: The application's metrics; where it has set up no MeterProvider they do nothing.
_meter = metrics.get_meter(_NAME, __version__, schema_url=genai.SCHEMA)
_duration, _tokens, _ttft = (_meter.create_histogram(*named) for named in (genai.DURATION, genai.TOKENS, genai.TTFT))
_log = logging.getLogger(__name__)
_tell: Callable[[str], None] = _log.warning
_told: set[str] = set()
#: The calls that run, by their number.
_open: dict[int, _Trace] = {}


def tell_by(tell: Callable[[str], None]) -> None:
    """From now on ``tell`` gets what a person should know, in a sentence; without this it is logged."""
    global _tell
    _tell = tell


@contextmanager
def span_of(run: Run) -> Iterator[None]:
    """A span around the call, ended by whatever ends that."""
    call, token = None, None
    try:
        call = _open[run.info.number] = _Trace(run)
        token = context.attach(trace.set_span_in_context(call.span))
    except Exception as error:
        _complain(error)
    failure: Optional[BaseException] = None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        _open.pop(run.info.number, None)
        try:
            if token is not None:
                context.detach(token)
            if call is not None:
                call.end(failure)
        except Exception as error:
            _complain(error)


class _Trace:
    """The spans of one call."""

    def __init__(self, run: Run) -> None:
        self._run, self._content = run, run.call.settings.telemetry.content
        self._began = time.monotonic()
        self._tracer = _tracer(run.call.settings.telemetry)
        self._attempt: Optional[Span] = None
        self._epoch = 0  # nanoseconds since 1970 when the clock of the event loop began
        self._done: Optional[events.Done] = None
        info, replayed = run.info, run.record.replay is not None
        known: dict[str, Attribute] = {
            **self._identity(),
            **genai.asked(run.call.body),
            f"{_NAME}.call": info.number,
            f"{_NAME}.tier": info.tier,
            f"{_NAME}.replayed": replayed,
        }
        named = {"gen_ai.agent.name": info.role, f"{_NAME}.role": info.caller.role, f"{_NAME}.action": info.action}
        known.update({name: value for name, value in named.items() if value})
        # An answer out of the journal is no call to anybody.
        kind = SpanKind.INTERNAL if replayed else SpanKind.CLIENT
        self.span = self._tracer.start_span(self._clean(f"{genai.OPERATION} {info.model}"), kind=kind, attributes=self._all_clean(known))

    def take(self, event: events.Event) -> None:
        """What happened to the call."""
        if isinstance(event, events.Sent):
            self._begin_attempt(event)
        elif isinstance(event, events.Done):
            self._done = event
            self._end_attempt(None)
        elif isinstance(event, events.Failed):
            self._end_attempt(event.cause)
        else:
            if isinstance(event, events.Retry):
                self._end_attempt(event.cause)
            elif isinstance(event, (events.Waiting, events.Loading)) and self._run.life.phase not in _UNDER_WAY:
                self._end_attempt(errors.ServerUnavailable.__name__)
            self.span.add_event(f"{_NAME}.{type(event).__name__.lower()}", self._all_clean(self._facts(event)))

    def end(self, failure: Optional[BaseException]) -> None:
        """The call is over."""
        try:
            self._end_attempt(None if failure is None else type(failure).__name__)
            if self.span.is_recording():
                self._tell_outcome(failure)
        finally:
            self.span.end()
        if self._run.record.replay is None:
            self._measure(failure)

    def _tell_outcome(self, failure: Optional[BaseException]) -> None:
        span = self.span
        for name, value in self._all_clean(self._outcome(failure)).items():
            span.set_attribute(name, value)
        if failure is not None:
            words = str(failure) if self._content else _meaning(type(failure))
            span.set_status(Status(StatusCode.ERROR, self._clean(words)))
        if self._content:
            for name, text in self._said(failure).items():
                span.set_attribute(name, self._clean(text, _SECRET))

    # ------------------------------------------------------------------ attempts

    def _begin_attempt(self, sent: events.Sent) -> None:
        self._end_attempt(None)
        facts: dict[str, Optional[Attribute]] = {
            "attempt": sent.attempt, "prompt_tokens": sent.prompt_tokens, "expected_first_token": sent.expected,
            "deadline.first_token": sent.first_token, "deadline.stall": sent.stall, "deadline.total": sent.total,
        }  # fmt: skip
        known = {f"{_NAME}.{name}": value for name, value in facts.items() if value is not None}
        self._epoch = time.time_ns() - int(anyio.current_time() * 1e9)
        above = trace.set_span_in_context(self.span)
        self._attempt = self._tracer.start_span(f"attempt {sent.attempt}", context=above, attributes=known)

    def _end_attempt(self, cause: Optional[str]) -> None:
        span, self._attempt = self._attempt, None
        if span is None:
            return
        first = self._run.life.first_token_at
        if first is not None:
            span.add_event(f"{_NAME}.first_token", timestamp=self._epoch + int(first * 1e9))
        if cause is not None:
            span.set_attribute("error.type", cause)
            span.set_status(Status(StatusCode.ERROR, _meaning(getattr(errors, cause, None))))
        span.end()

    # ------------------------------------------------------------------ what is told

    def _identity(self) -> dict[str, Attribute]:
        """What the call is known by, as far as the server has said what it is."""
        call, server = self._run.call, self._run.server
        if server is servers.UNKNOWN:
            server = servers.known(call.endpoint) or server
        named = call.settings.server
        return genai.identity(call.endpoint.model, call.endpoint.address, server.name if named == "auto" else named)

    def _facts(self, event: events.Event) -> dict[str, Attribute]:
        """An event's figures, and its words where content is wanted."""
        kind = type(event).__name__.lower()
        facts: dict[str, Attribute] = {}
        for field in dataclasses.fields(event):
            value = getattr(event, field.name)
            if isinstance(value, (bool, int, float)) or (isinstance(value, str) and self._content):
                facts[f"{_NAME}.{kind}.{field.name}"] = value
        if isinstance(event, events.Retry):
            facts["error.type"] = event.cause
        return facts

    def _outcome(self, failure: Optional[BaseException]) -> dict[str, Attribute]:
        run, answer = self._run, self._run.answer
        known: dict[str, Attribute] = {**self._identity(), f"{_NAME}.attempts": run.life.attempt, f"{_NAME}.queued": run.life.waited}
        request = _parsed(run.request)
        if isinstance(request.get("max_tokens"), int):  # what was left beside the prompt may be less than was wanted
            known["gen_ai.request.max_tokens"] = request["max_tokens"]
        if failure is not None:
            known["error.type"] = type(failure).__name__
            setting = getattr(failure, "setting", None)
            return {**known, f"{_NAME}.setting": setting} if setting else known
        whole = answer.as_record()
        if whole["id"]:
            known["gen_ai.response.id"] = whole["id"]
        known["gen_ai.response.model"] = whole["model"] or run.info.model
        known["gen_ai.response.finish_reasons"] = [str(answer.finish_reason)]
        if self._done is not None:  # else nothing was computed
            done, counted = self._done, self._counted()
            known[f"{_NAME}.usage.estimated"] = len(counted) < 2
            cached = run.timings().cached_tokens
            details = (answer.usage or {}).get("completion_tokens_details")
            reasoning = positive(details.get("reasoning_tokens")) if isinstance(details, Mapping) else None
            known.update(genai.usage(done.prompt_tokens, done.completion_tokens, cached, reasoning))
            if done.ttft is not None:
                known["gen_ai.response.time_to_first_chunk"] = done.ttft
            ours: dict[str, Attribute] = {"cut_by": done.cut_by, "changed_messages": done.changed_messages, "saved_tokens": run.saved}
            known.update({f"{_NAME}.{name}": value for name, value in ours.items() if value})
        return known

    def _counted(self) -> dict[str, int]:
        """Tokens by type, as far as the server itself has counted them."""
        counts = self._run.answer.usage or {}
        found = {"input": counts.get("prompt_tokens"), "output": counts.get("completion_tokens")}
        return {kind: count for kind, count in found.items() if isinstance(count, int) and count >= 0}

    def _said(self, failure: Optional[BaseException]) -> dict[str, str]:
        """What was asked, as it was sent, and what was answered."""
        run, request = self._run, _parsed(self._run.request) or self._run.call.body
        content = {"gen_ai.input.messages": genai.input_messages(request["messages"])}
        if request.get("tools"):
            content["gen_ai.tool.definitions"] = genai.tool_definitions(request["tools"])
        got = run.answer.as_record()
        if failure is None or run.answer.tokens:
            reason = None if failure is not None else run.answer.finish_reason
            content["gen_ai.output.messages"] = genai.output_messages(got["content"], got["reasoning"], got["tool_calls"], reason)
        return content

    def _measure(self, failure: Optional[BaseException]) -> None:
        known = self._all_clean(self._identity())
        if failure is not None:
            known["error.type"] = type(failure).__name__
        else:
            known["gen_ai.response.model"] = self._clean(self._run.answer.as_record()["model"] or self._run.info.model)
        _duration.record(time.monotonic() - self._began, known)
        if self._done is not None:
            for kind, count in self._counted().items():
                _tokens.record(count, {**known, "gen_ai.token.type": kind})
            if self._done.ttft is not None:
                _ttft.record(self._done.ttft, known)

    # ------------------------------------------------------------------ what is not told

    def _clean(self, text: str, least: int = 4) -> str:
        """``text`` without a key of at least so many characters, and without what UTF-8 cannot hold."""
        text = self._run.call.endpoint.without_key(text, least)
        return text.encode("utf-8", "replace").decode("utf-8")

    def _all_clean(self, known: Mapping[str, Attribute]) -> dict[str, Attribute]:
        def clean(value: Attribute) -> Attribute:
            if isinstance(value, str):
                return self._clean(value)
            return value if isinstance(value, (bool, int, float)) else [self._clean(one) for one in value]

        return {name: clean(value) for name, value in known.items()}


def _tracer(settings: TelemetrySettings) -> trace.Tracer:
    if settings.endpoint is not None:
        return otlp.provider_for(settings.endpoint, _say).get_tracer(_NAME, __version__, genai.SCHEMA)
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        _say_once("llm.local.telemetry is on, but has no endpoint, and this program has set up no TracerProvider: no span goes "
                  "anywhere. Set llm.local.telemetry.endpoint, such as http://localhost:4318.")  # fmt: skip
    return trace.get_tracer(_NAME, __version__, schema_url=genai.SCHEMA)


def _parsed(request: bytes) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(request) if request else {}
    return parsed


def _meaning(kind: Optional[type]) -> str:
    """What a class of errors means, in the first sentence of its documentation."""
    return (inspect.getdoc(kind) or "").partition("\n")[0] if kind is not None else ""


def _say(what: str) -> None:
    """What ``tell_by`` was given last; always this one function, since ``provider_for`` makes a provider for each that it gets."""
    _tell(what)


def _say_once(what: str) -> None:
    if what not in _told:
        _told.add(what)
        _tell(what)


def _complain(error: Exception) -> None:
    _log.debug("telemetry failed", exc_info=True)
    _say_once(f"Telemetry fails ({type(error).__name__}: {error}); calls go on without it.")


def _take(event: events.Event) -> None:
    call = _open.get(event.call.number)
    if call is not None:
        call.take(event)


events.subscribe(_take, *(kind for kind in events.KINDS if kind not in (*events.FREQUENT, events.Prefill)))
