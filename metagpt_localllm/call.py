"""One call from MetaGPT's messages to a whole answer: the one way through this package.

    choose the tier → identify the server → fit the context → wait for a turn → plan the deadlines → send
    → read the stream, and look after the server when it is silent → learn → retry or return

The steps are in ``context`` and ``attempt``; the decisions are pure and live in ``tiers``, ``deadlines``,
``latency``, ``trimming``, ``failures`` and ``lifecycle``.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import AsyncIterator, Mapping, Optional, Sequence

import anyio
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion

from metagpt_localllm import errors, events, latency, servers
from metagpt_localllm.answer import Answer
from metagpt_localllm.attempt import attempt, broken
from metagpt_localllm.concurrency import gate_for
from metagpt_localllm.context import prepare
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.lifecycle import BackOff, GiveUp, SendAgain, WaitForServer
from metagpt_localllm.run import Call, Prompt, Run
from metagpt_localllm.servers import Identified
from metagpt_localllm.tokens import estimate_text
from metagpt_localllm.truncation import learn, learn_count, unmask

__all__ = ["Call", "Outcome", "complete"]


@dataclass(frozen=True)
class Outcome:
    """A whole answer. ``trims``: what its prompt lost to fit the context window, in this call."""

    text: str
    reasoning: str
    completion: ChatCompletion
    usage: CompletionUsage
    trims: Sequence[events.Trimmed] = ()


async def complete(call: Call) -> Outcome:
    """Asks until the answer is whole.

    Raises:
        LocalLLMError: one of its subclasses, when the attempts, the time or the remedies are used up.
    """
    run = Run(call)
    with run.scope:
        return await _until_whole(run)
    run.give_up(run.life.expire(anyio.current_time()))


async def _until_whole(run: Run) -> Outcome:
    call, life = run.call, run.life
    if (await _identify(run)).hung:
        life.spend_attempt()
    prompt = await prepare(run)

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
            run.history.sent(prompt.messages, prompt.counts)
            failure = await unmask(run, prompt, await attempt(run, prompt.content))
        _record(run, prompt, failure)
        if failure is None:
            try:
                outcome = _outcome(run, prompt)
                break
            except (ValueError, TypeError) as error:
                failure = broken(f"the answer is no chat completion ({type(error).__name__})")
        step = life.fail(failure, anyio.current_time())
        if isinstance(step, GiveUp):
            run.give_up(step.failure)
        run.alone = run.alone or failure.alone
        if run.answer.content:
            run.show("\n[the answer broke off; trying again]\n")
        if isinstance(step, BackOff):
            events.publish(events.Retry(run.info, life.attempt, failure.error.__name__, failure.what, step.delay))
            await anyio.sleep(step.delay)
        elif isinstance(step, WaitForServer):
            events.publish(events.Waiting(run.info, failure.what, step.until - anyio.current_time()))
            if not await servers.wait_until_up(call.endpoint, step.until, step.pause):
                run.give_up(life.waited_in_vain(failure, anyio.current_time()).failure)
            servers.forget(call.endpoint, restarted=True)
            run.history.forget_prompts()
            await _identify(run)
            prompt = await prepare(run)
        elif isinstance(step, SendAgain):
            what = f"{failure.what}. {failure.remedy}".rstrip(". ")
            events.publish(events.Retry(run.info, life.attempt, failure.error.__name__, what, 0.0))
            if failure.kind is Kind.STRICT:
                servers.mark_strict(call.endpoint)
            else:
                servers.forget(call.endpoint)
            await _identify(run)
            if failure.kind is not Kind.STRICT:
                learn(run, failure, prompt)
            prompt = await prepare(run)

    life.whole()
    run.show("\n")
    learn_count(run, prompt)
    usage = outcome.usage
    events.publish(
        events.Done(
            run.info, life.attempt, usage.prompt_tokens, usage.completion_tokens, str(run.answer.finish_reason),
            life.ttft, life.longest_gap, anyio.current_time() - life.started, _cut_by(run, prompt, usage), prompt.changed,
        )
    )  # fmt: skip
    return outcome


async def _identify(run: Run) -> Identified:
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


#: Share of the context window from which on it is full: servers leave some tokens free.
_FULL = 0.95
#: The deadline that each time-out is the end of.
_CENSORED: Mapping[type[errors.LocalLLMError], str] = {
    errors.FirstTokenTimeout: "first_token",
    errors.StreamStalled: "stall",
    errors.TotalTimeout: "total",
}


def _record(run: Run, prompt: Prompt, failure: Optional[Failure]) -> None:
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


def _outcome(run: Run, prompt: Prompt) -> Outcome:
    answer = run.answer
    usage = answer.completion_usage(prompt.tokens, estimate_text(answer.content) + estimate_text(answer.reasoning))
    return Outcome(answer.content, answer.reasoning, answer.completion(run.call.endpoint.model, usage), usage, run.trims)


def _cut_by(run: Run, prompt: Prompt, usage: CompletionUsage) -> str:
    """What ended an answer of the finish_reason "length", which servers give for max_tokens and for a full window alike."""
    if run.answer.finish_reason != "length":
        return ""
    if usage.completion_tokens >= prompt.wanted - 1:
        return "max_tokens"
    asked_less = prompt.max_tokens < prompt.wanted and usage.completion_tokens >= prompt.max_tokens - 1
    return "window" if asked_less or usage.total_tokens >= _FULL * (prompt.window or math.inf) else "server"
