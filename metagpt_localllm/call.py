"""One call from MetaGPT's messages to a whole answer: the one way through this package.

    choose the tier → look into the journal → identify the server → fit the context → wait for a turn → plan the deadlines
    → send, or go on with what there is → read the stream, and look after the server when it is silent → learn
    → retry or return

The steps are in ``record``, ``context``, ``continuing`` and ``attempt``; the decisions are pure and live in ``tiers``, ``deadlines``,
``latency``, ``trimming``, ``failures`` and ``lifecycle``.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import AsyncIterator, ContextManager, Mapping, Optional, Sequence

import anyio
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion

from metagpt_localllm import errors, events, latency, servers
from metagpt_localllm.answer import Answer
from metagpt_localllm.attempt import attempt, broken
from metagpt_localllm.concurrency import gate_for
from metagpt_localllm.context import prepare
from metagpt_localllm.continuing import begin, has_gained, with_limit
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.journal import CallRecord
from metagpt_localllm.lifecycle import BackOff, GiveUp, WaitForServer
from metagpt_localllm.run import Call, Prompt, Run
from metagpt_localllm.servers import Identified
from metagpt_localllm.servers.base import positive
from metagpt_localllm.session import is_open, session_for
from metagpt_localllm.tokens import estimate_text
from metagpt_localllm.truncation import learn, learn_count, unmask

__all__ = ["Call", "Outcome", "complete"]


@dataclass(frozen=True)
class Outcome:
    """A whole answer.

    Attributes:
        trims: what its prompt lost to fit the context window, in this call.
        replayed: whether it is an earlier run's, from the journal, and cost nothing.
    """

    text: str
    reasoning: str
    completion: ChatCompletion
    usage: CompletionUsage
    trims: Sequence[events.Trimmed] = ()
    replayed: bool = False


async def complete(call: Call) -> Outcome:
    """Asks until the answer is whole.

    Raises:
        LocalLLMError: one of its subclasses, when the attempts, the time or the remedies are used up.
    """
    if not is_open(call.settings.journal):
        await anyio.to_thread.run_sync(session_for, call.settings.journal)
    run = Run(call)
    with _traced(run):
        return await _answered(run)


def _traced(run: Run) -> ContextManager[None]:
    """A span of OpenTelemetry around the call, where that is wanted; else nothing of it is even imported."""
    if not run.call.settings.telemetry.enabled:
        return contextlib.nullcontext()
    from metagpt_localllm.telemetry import span_of

    return span_of(run)


async def _answered(run: Run) -> Outcome:
    if run.record.replay is not None:
        return _replay(run, run.record.replay)
    try:
        with run.scope:
            return await _until_whole(run)
        run.give_up(run.life.expire(anyio.current_time()))
    except BaseException as error:
        life = run.life
        run.record.ended(
            run.answer, error, run.trims, ttft=life.ttft, longest_gap=life.longest_gap, queued=life.waited
        )  # fmt: skip
        if not isinstance(error, errors.LocalLLMError):
            events.publish(events.Cancelled(run.info))
        raise


async def _until_whole(run: Run) -> Outcome:
    if (await _identify(run)).hung:
        run.life.spend_attempt()
    prompt: Optional[Prompt] = None
    beginning = run.record.beginning

    while True:
        if prompt is None and not run.server.shares:
            prompt = await prepare(run)
        async with _turn(run):
            if run.server.shares:  # while this call waited, another model may have taken the place of its own
                await run.identify()
                await _load(run)
            prompt = prompt or await prepare(run)
            if beginning is not None and run.server is not servers.UNKNOWN:  # of one that is not up yet nothing can be proved
                if not run.answer.tokens:
                    _take_up(run, beginning, prompt)
                beginning = None
            failure = await _try(run, prompt)
        _learn_speed(run, prompt, failure)
        if failure is None:
            try:
                outcome = _outcome(run, prompt)
            except (ValueError, TypeError) as error:
                failure = broken(f"the answer is no chat completion ({type(error).__name__})")
            else:
                _record(run, prompt, outcome.usage)
                return outcome
        prompt = await _after(run, prompt, run.without_key(failure))


async def _after(run: Run, prompt: Prompt, failure: Failure) -> Optional[Prompt]:
    """What follows a failed attempt: a pause, a wait for the server, or at once the next; its prompt, or None for a new one."""
    call, life, answer = run.call, run.life, run.answer
    run.record.failed(answer, failure.error.__name__, failure.what, life.ttft, life.longest_gap)
    step = life.fail(failure, anyio.current_time(), gained=has_gained(run))
    run.alone = run.alone or failure.alone
    if isinstance(step, GiveUp):
        run.give_up(step.failure)
    if isinstance(step, BackOff):
        run.tell_retry(failure, failure.what, step.delay)
        await anyio.sleep(step.delay)
        return prompt
    if isinstance(step, WaitForServer):
        run.tell_wait(failure.what, step.until - anyio.current_time(), loading=failure.kind is Kind.LOADING)
        if not await servers.wait_until_up(call.endpoint, step.until, step.pause):
            run.give_up(life.waited_in_vain(failure, anyio.current_time()).failure)
        servers.forget(call.endpoint, restarted=True)
        run.history.forget_prompts()
    else:
        run.tell_retry(failure, f"{failure.what}. {failure.remedy}".rstrip(". "), 0.0)
        if failure.kind is Kind.STRICT:
            servers.mark_strict(call.endpoint)
        elif failure.kind is not Kind.CONTINUATION:
            servers.forget(call.endpoint)
    await _identify(run)
    if failure.kind in (Kind.OVERFLOW, Kind.TRUNCATED):
        learn(run, failure, prompt)
    return None


async def _try(run: Run, prompt: Prompt) -> Optional[Failure]:
    """One attempt: it goes on with what there is of the answer, or asks for all of it; None when the answer is whole."""
    call, life = run.call, run.life
    deadlines = run.deadlines = run.plan(prompt)
    life.send(anyio.current_time(), deadlines)
    begun = await begin(run)
    if isinstance(begun, Failure):
        return begun
    events.publish(
        events.Sent(
            run.info, life.attempt, call.settings.retry.attempts, prompt.tokens, run.expected, deadlines.first_token,
            deadlines.stall, deadlines.total, deadlines.why, deadlines.progress, life.remaining(anyio.current_time()),
        )
    )  # fmt: skip
    run.saved = 0
    if begun is not None:
        run.saved = begun.answer.begun_tokens
        events.publish(events.Continued(run.info, life.attempt, run.saved))
    elif run.answer.content:
        run.show("\n[the answer broke off, and begins afresh]\n")
    run.request = run.request if begun is not None else prompt.content
    run.answer, run.death = begun.answer if begun is not None else Answer(), None
    run.history.sent(prompt.messages, prompt.counts)
    run.record.sent(run.request, deadlines.as_dict(), prompt.tokens)
    failure = await attempt(run, begun.content if begun is not None else prompt.content)
    if begun is None:
        return await unmask(run, prompt, failure)
    refused = failure is not None and (failure.kind in _REFUSED or failure.error is errors.RequestRejected)
    if run.answer.restarted or refused:
        return _not_continued(run, failure)
    return failure


def _record(run: Run, prompt: Prompt, usage: CompletionUsage) -> None:
    """The answer is whole: that is written down, told, and learned from."""
    life, answer = run.life, run.answer
    life.whole()
    run.show("\n")
    if not answer.begun_tokens:
        learn_count(run, prompt)
    run.record.done(
        answer, usage.model_dump(), run.trims, saved=run.saved, ttft=life.ttft, longest_gap=life.longest_gap,
        timings=answer.timings or {}, cached=run.timings().cached_tokens, queued=life.waited,
    )  # fmt: skip
    events.publish(
        events.Done(
            run.info, life.attempt, usage.prompt_tokens, usage.completion_tokens, str(answer.finish_reason),
            life.ttft, life.longest_gap, anyio.current_time() - life.started, _cut_by(run, prompt, usage), prompt.changed,
        )
    )  # fmt: skip


def _replay(run: Run, left: CallRecord) -> Outcome:
    """The answer that an earlier run got for this very request."""
    run.answer = Answer.of_record(left.answer or {})
    usage = run.answer.completion_usage(0, 0)
    run.record.replayed(left.number, usage.completion_tokens)
    run.show(run.answer.content + "\n")
    events.publish(events.Replayed(run.info, left.number, usage.completion_tokens))
    return replace(_outcome_of(run.answer, run.call.endpoint.model, usage), replayed=True)


def _take_up(run: Run, left: CallRecord, prompt: Prompt) -> None:
    """The beginning of an answer that an earlier run got before it was stopped, and what it had asked."""
    run.answer, run.request = Answer.of_record(left.partial or {}), with_limit(left.request or b"", prompt.max_tokens)
    run.show(run.answer.content)


def _not_continued(run: Run, failure: Optional[Failure]) -> Failure:
    """The server does not go on with answers after all: from now on they are asked for afresh."""
    servers.learned(run.call.endpoint).continues = False
    what = failure.what if failure is not None else "it began a new turn"
    return Failure(Kind.CONTINUATION, errors.RequestRejected, f"the server did not go on with the answer that broke off: {what}")


async def _identify(run: Run) -> Identified:
    """Finds out what the server is, and lets it load its model where a request that gave up would abort the load."""
    identified = await run.identify()
    if run.server.facts.loaded is False and not run.server.shares:
        async with _turn(run):  # one call loads it for all that begin together
            await run.identify()
            await _load(run)
    return identified


async def _load(run: Run) -> None:
    """Lets the server load the model where it says that it has not, which counts against no deadline of the answer."""
    call = run.call
    if run.server.facts.loaded is False:
        limit = run.deadlines.total
        run.tell_wait(f"the model {call.endpoint.model} is being loaded", limit, loading=True)
        await servers.load(run.server, call.endpoint, limit)
        await run.identify()


@contextlib.asynccontextmanager
async def _turn(run: Run) -> AsyncIterator[None]:
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


#: What is no answer to a request that is to go on with one.
_REFUSED = frozenset({Kind.STRICT, Kind.OVERFLOW})
#: Share of the context window from which on it is full: servers leave some tokens free.
_FULL = 0.95
#: The deadline that each time-out is the end of.
_CENSORED: Mapping[type[errors.LocalLLMError], str] = {
    errors.FirstTokenTimeout: "first_token",
    errors.StreamStalled: "stall",
    errors.TotalTimeout: "total",
}


def _learn_speed(run: Run, prompt: Prompt, failure: Optional[Failure]) -> None:
    """What the attempt teaches about the server's speed; nothing where it never came to work."""
    life, answer = run.life, run.answer
    censored = _CENSORED.get(failure.error) if failure is not None and failure.kind is Kind.TRANSIENT else None
    tokens = answer.tokens - answer.begun_tokens
    if tokens <= 0 and censored is None:
        return
    now = anyio.current_time()
    told = run.timings()
    decoding = life.first_token_at is not None and life.last_token_at is not None
    run.history.record(
        latency.Sample(
            prompt_tokens=positive((answer.usage or {}).get("prompt_tokens")) or prompt.tokens,
            cached_tokens=told.cached_tokens,
            shared_tokens=run.shared_tokens,
            ttft=life.ttft,
            waited=told.load or 0.0,
            prefill_seconds=told.prefill,
            answer_tokens=max(tokens, 0),
            decode_seconds=(life.last_token_at or 0.0) - (life.first_token_at or 0.0) if decoding else None,
            longest_gap=life.longest_gap or None,
            censored=censored,
            elapsed=now - life.sent_at if censored == "total" else life.silence(now),
            attempt=life.attempt,
            load=run.server.facts.loaded is False,
        ),
        now,
    )


def _outcome(run: Run, prompt: Prompt) -> Outcome:
    answer = run.answer
    told = (answer.usage or {}).get("completion_tokens")
    estimated = 0 if isinstance(told, int) and told >= 0 else estimate_text(answer.content) + estimate_text(answer.reasoning)
    usage = answer.completion_usage(prompt.tokens, estimated)
    return replace(_outcome_of(answer, run.call.endpoint.model, usage), trims=run.trims)


def _outcome_of(answer: Answer, model: str, usage: CompletionUsage) -> Outcome:
    return Outcome(answer.content, answer.reasoning, answer.completion(model, usage), usage)


def _cut_by(run: Run, prompt: Prompt, usage: CompletionUsage) -> str:
    """What ended an answer of the finish_reason "length", which servers give for max_tokens and for a full window alike."""
    if run.answer.finish_reason != "length":
        return ""
    if usage.completion_tokens >= prompt.wanted - 1:
        return "max_tokens"
    asked_less = prompt.max_tokens < prompt.wanted and usage.completion_tokens >= prompt.max_tokens - 1
    return "window" if asked_less or usage.total_tokens >= _FULL * (prompt.window or math.inf) else "server"
