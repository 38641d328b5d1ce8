"""What the calls in the journal took: the figures of one call, and of groups of them. Pure.

What each figure means:

- **calls**: all that were recorded, those of an earlier start that another call has taken over (superseded) included, since the
  server worked for them, too. An answer that was given again from the journal is no call; it is counted apart, as *replayed*.
- **first token** (ttft) and **total** are of answered calls only. A call that failed took as long as its deadlines let it, and one
  that was killed has no end: *failed*, *cancelled* and *unfinished* count them, and *seconds* has the time of all that ended.
- **first token**: from the request that was answered to its first token. Where it went on with an answer that had broken
  off, that is the first new token.
- **total**: from the first request of the call to its end, with the attempts that failed and the pauses between them, without
  the wait for a turn on our side (*queued*).
- **decode**: tokens after the first one over the time from the first token to the end of the attempt that answered. What it
  went on with was not decoded by it, and does not count. Unknown where the answer came in one piece.
- **prefill**: prompt tokens that were not cached over the time that the server says it took for them (llama.cpp's ``timings``).
- **retries**: requests of a call after its first one. **timeouts**: requests that ended by one of our deadlines.
- **trimmed**: tokens that were taken out of prompts; what an earlier call took out of the same conversation counts there, once.
- **saved**: tokens that were not decoded again, since an answer was gone on with or given again.

The speed of a group is all its tokens over all their seconds, so that short answers do not weigh more than they took.
A percentile is the smallest value that so many per cent of all do not exceed (nearest rank): always one that occurred; of fewer
than 20 calls p95 is the slowest, of fewer than 100 p99 is.

Seconds are those of this machine's clock. Against a simulated server that runs faster than real
(``METAGPT_LOCALLLM_TIME_SCALE``) they are short, and speeds are high, by that factor.
"""

from __future__ import annotations

import math
from collections import Counter, abc, defaultdict
from dataclasses import dataclass, field
from typing import Any, Iterable, Mapping, Optional, Sequence

from metagpt_localllm.journal import CallRecord, Replay

__all__ = [
    "DIMENSIONS", "TIMEOUTS", "CallFigures", "Group", "Percentiles", "figures_of", "known_number", "mappings", "per_call",
    "per_replay", "percentile", "percentiles", "summarize",
]  # fmt: skip

#: What calls can be grouped by.
DIMENSIONS: tuple[str, ...] = ("action", "role", "model", "tier", "server", "run")
#: The errors that are the end of a deadline of ours.
TIMEOUTS = frozenset({"FirstTokenTimeout", "StreamStalled", "TotalTimeout"})


@dataclass(frozen=True)
class CallFigures:
    """The figures of one call, or of one answer that was given again. Moments in seconds since 1970; None: not known.

    Attributes:
        outcome: done, failed, cancelled, running (also of one that was killed) or replayed.
        superseded: another call has taken its place.
        sent: when its first request went out.
        queued: seconds that it waited for its turn on our side.
        ttft: seconds to the first token, of the attempt that answered.
        total: seconds from the first request to the end, without waiting for a turn, however it ended.
        longest_gap: seconds between two tokens of the attempt that answered.
        prompt_tokens: by the server's count where it is done, else as estimated.
        cached_tokens: of these, from the server's prefix cache.
        answer_tokens: of the whole answer.
        decode_tokens, decode_seconds: after the first token of the attempt that answered.
        prefill_tokens, prefill_seconds: of that attempt's prompt, by the server's clock.
        deadlines: of the last attempt, in seconds by name.
        retries: requests after the first.
        errors: class names, one for each request that failed.
        timeouts: those of them that are in TIMEOUTS.
        trimmed_tokens: that this call took out of its prompt, in ``trims`` steps.
        saved_tokens: of its answer that were not decoded again.
    """

    run: str
    number: int
    action: str
    role: str
    model: str
    tier: str
    server: str = ""
    outcome: str = "running"
    superseded: bool = False
    finish_reason: Optional[str] = None
    started: float = 0.0
    sent: Optional[float] = None
    ended: Optional[float] = None
    queued: float = 0.0
    ttft: Optional[float] = None
    total: Optional[float] = None
    longest_gap: Optional[float] = None
    prompt_tokens: Optional[int] = None
    cached_tokens: Optional[int] = None
    answer_tokens: Optional[int] = None
    decode_tokens: Optional[int] = None
    decode_seconds: Optional[float] = None
    prefill_tokens: Optional[int] = None
    prefill_seconds: Optional[float] = None
    deadlines: Mapping[str, float] = field(default_factory=dict)
    retries: int = 0
    errors: Sequence[str] = ()
    timeouts: int = 0
    trims: int = 0
    trimmed_tokens: int = 0
    saved_tokens: int = 0

    @property
    def decode_rate(self) -> Optional[float]:
        """Tokens per second."""
        return _rate(self.decode_tokens, self.decode_seconds)

    @property
    def prefill_rate(self) -> Optional[float]:
        """Tokens per second."""
        return _rate(self.prefill_tokens, self.prefill_seconds)


@dataclass(frozen=True)
class Percentiles:
    """Of ``count`` values, by nearest rank; ``most`` is the largest."""

    count: int
    p50: float
    p95: float
    p99: float
    most: float


@dataclass(frozen=True)
class Group:
    """The figures of the calls that have ``keys`` in common; see the module for what each means.

    Attributes:
        keys: (dimension, value); empty for all calls together.
        answered, failed, cancelled, unfinished: of ``calls``.
        superseded: of ``calls``, whatever their outcome.
        replayed: answers that were given again; none of ``calls``.
        seconds: of all calls that have ended, with those that failed.
        queued: seconds that they waited for their turn on our side.
        ttft, total: seconds, of answered calls.
        prompt: tokens of one prompt.
        prompt_tokens, answer_tokens: of all calls together.
        cached_share: of prompt tokens from the server's prefix cache, 0 to 1, where the server says.
        decode_rate, prefill_rate: tokens per second.
        errors: requests that failed, by the error's class.
    """

    keys: tuple[tuple[str, str], ...] = ()
    calls: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    unfinished: int = 0
    superseded: int = 0
    replayed: int = 0
    seconds: float = 0.0
    queued: float = 0.0
    ttft: Optional[Percentiles] = None
    total: Optional[Percentiles] = None
    prompt: Optional[Percentiles] = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_share: Optional[float] = None
    decode_rate: Optional[float] = None
    prefill_rate: Optional[float] = None
    retries: int = 0
    timeouts: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    trims: int = 0
    trimmed_tokens: int = 0
    saved_tokens: int = 0


# ------------------------------------------------------------------------------------------ one call


def per_call(run_id: str, call: CallRecord) -> CallFigures:
    """The figures of a call. What a damaged disk has made of its record is taken for unknown, and raises nothing."""
    attempts = mappings(call.attempts)
    last: Mapping[str, Any] = attempts[-1] if attempts else {}
    usage: Mapping[str, Any] = call.usage if isinstance(call.usage, abc.Mapping) else {}
    trims, done = mappings(call.trims), call.outcome == "done"
    errors = [str(attempt["error"]) for attempt in attempts if attempt.get("error")]
    sent = known_number(attempts[0].get("at")) if attempts else None
    ended, saved = known_number(call.ended), _count(call.saved_tokens) or 0
    answer_tokens = _count(usage.get("completion_tokens"))
    prompt_tokens = _count(usage.get("prompt_tokens"))
    cached = _count(call.cached_tokens)
    decode = _decode(last, answer_tokens, saved, ended) if done else (None, None)
    prefill = _prefill(call.timings, known_number(last.get("ttft"))) if done else (None, None)
    return CallFigures(
        run=run_id, number=call.number, action=str(call.action), role=str(call.role), model=str(call.model), tier=str(call.tier),
        server=str(call.server), outcome=call.outcome, superseded=call.superseded, finish_reason=call.finish_reason,
        started=known_number(call.started) or 0.0,
        sent=sent,
        ended=ended,
        queued=known_number(call.queued) or 0.0,
        ttft=known_number(last.get("ttft")) if done else None,
        total=_total(call, sent, ended),
        longest_gap=known_number(last.get("longest_gap")) if done else None,
        prompt_tokens=prompt_tokens if prompt_tokens is not None else _count(last.get("prompt_tokens")),
        cached_tokens=cached if prompt_tokens is None or cached is None else min(cached, prompt_tokens),
        answer_tokens=answer_tokens,
        decode_tokens=decode[0], decode_seconds=decode[1], prefill_tokens=prefill[0], prefill_seconds=prefill[1],
        deadlines=_deadlines(last.get("deadlines")),
        retries=max(len(attempts) - 1, 0),
        errors=tuple(errors),
        timeouts=sum(error in TIMEOUTS for error in errors),
        trims=len(trims),
        trimmed_tokens=sum(_count(trim.get("removed_tokens")) or 0 for trim in trims),
        saved_tokens=saved,
    )  # fmt: skip


def per_replay(replay: Replay, call: Optional[CallRecord]) -> CallFigures:
    """The figures of an answer that was given again: whose it is, when, and what it saved.

    Args:
        call: that it was the answer of; None where it can no longer be read.
    """
    return CallFigures(
        run=replay.run, number=replay.number, outcome="replayed", started=replay.at, ended=replay.at,
        action=str(call.action) if call else "", role=str(call.role) if call else "", model=str(call.model) if call else "",
        tier=str(call.tier) if call else "", server=str(call.server) if call else "", saved_tokens=_count(replay.tokens) or 0,
    )  # fmt: skip


def figures_of(
    recorded: Iterable[tuple[str, CallRecord]], replays: Iterable[Replay] = (), since: float = 0.0
) -> list[CallFigures]:
    """The figures of all that began at ``since`` (seconds since 1970) or later.

    Args:
        recorded: the calls with the ids of their runs (``Journal.recorded``), those that began before as well: one of them
            may have been replayed since.
    """
    calls = {(run, call.number): call for run, call in recorded}
    figures = [per_call(run, call) for (run, _), call in calls.items() if (known_number(call.started) or 0.0) >= since]
    figures += [per_replay(replay, calls.get((replay.run, replay.number))) for replay in replays if replay.at >= since]
    return figures


def _total(call: CallRecord, sent: Optional[float], ended: Optional[float]) -> Optional[float]:
    if sent is None or ended is None or call.outcome == "running":
        return None
    # What lies before the first request is no part of it; of the wait for turns, only the rest lies after that.
    waited = max((known_number(call.queued) or 0.0) - max(sent - (known_number(call.started) or sent), 0.0), 0.0)
    return max(ended - sent - waited, 0.0)


def _decode(
    attempt: Mapping[str, Any], told: Optional[int], saved: int, call_ended: Optional[float]
) -> tuple[Optional[int], Optional[float]]:
    """Tokens after the first and their seconds."""
    at, ttft, ended = known_number(attempt.get("at")), known_number(attempt.get("ttft")), known_number(attempt.get("ended")) or call_ended
    chunks = (_count(attempt.get("tokens")) or 0) - saved
    if at is None or ttft is None or ended is None or chunks < 2:
        return None, None
    # Chunks may hold several tokens each; what the server counted is nearer to the truth.
    tokens, seconds = max((told or 0) - saved, chunks) - 1, ended - at - ttft
    return (tokens, seconds) if seconds > 0 else (None, None)


def _prefill(timings: Any, ttft: Optional[float]) -> tuple[Optional[int], Optional[float]]:
    """Prompt tokens that were not cached, and their seconds, of llama.cpp's ``timings``."""
    told = timings if isinstance(timings, abc.Mapping) else {}
    tokens, milliseconds = _count(told.get("prompt_n")), known_number(told.get("prompt_ms"))
    if not tokens or not milliseconds or ttft is None:
        return None, None
    # A simulated server's clock runs faster than ours; on one clock the prompt never takes longer than the first token.
    seconds = min(milliseconds / 1000, ttft)
    return (tokens, seconds) if seconds > 0 else (None, None)


def _deadlines(value: Any) -> Mapping[str, float]:
    known = value if isinstance(value, abc.Mapping) else {}
    return {str(name): seconds for name, given in known.items() if (seconds := known_number(given)) is not None}


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """The mappings in a list; none where a damaged record has something else there."""
    return [one for one in value if isinstance(one, abc.Mapping)] if isinstance(value, (list, tuple)) else []


def known_number(value: Any) -> Optional[float]:
    """A finite number that is not negative, such as a time or a count; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _LARGEST:
        return None
    return float(value)


def _count(value: Any) -> Optional[int]:
    number = known_number(value)
    return None if number is None else int(number)


#: Larger than any time or count that means something.
_LARGEST = 1e15


# ------------------------------------------------------------------------------------------ many calls


def percentile(ordered: Sequence[float], per_cent: int) -> float:
    """The smallest of the values, which are in ascending order, that so many per cent of them do not exceed.

    Raises:
        ValueError: there are none, or ``per_cent`` is not between 0 and 100.
    """
    if not ordered or not 0 <= per_cent <= 100:
        raise ValueError("a percentile is of some values, and between 0 and 100")
    return ordered[max(-(-len(ordered) * per_cent // 100), 1) - 1]


def percentiles(values: Iterable[Optional[float]]) -> Optional[Percentiles]:
    """Of those values that are known; None where none is."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p95, p99 = (percentile(ordered, per_cent) for per_cent in (50, 95, 99))
    return Percentiles(len(ordered), p50, p95, p99, ordered[-1])


def summarize(figures: Iterable[CallFigures], by: Sequence[str]) -> list[Group]:
    """The figures in groups of equal ``by``, those first that took the most time; without ``by`` one group of all.

    Raises:
        ValueError: ``by`` has what is not one of DIMENSIONS.
    """
    unknown = [name for name in by if name not in DIMENSIONS]
    if unknown:
        raise ValueError(f"calls cannot be grouped by {', '.join(unknown)}, but by {', '.join(DIMENSIONS)}")
    found: dict[tuple[str, ...], list[CallFigures]] = defaultdict(list)
    for one in figures:
        found[tuple([getattr(one, name) for name in by])].append(one)
    groups = [_group(tuple(zip(by, values)), members) for values, members in found.items()]
    if not by and not groups:
        groups.append(Group())
    return sorted(groups, key=lambda group: (-group.seconds, -group.calls, group.keys))


def _group(keys: tuple[tuple[str, str], ...], members: Sequence[CallFigures]) -> Group:
    calls = [one for one in members if one.outcome != "replayed"]
    done = [one for one in calls if one.outcome == "done"]
    outcomes = Counter(one.outcome for one in calls)
    cached = [one for one in done if one.cached_tokens is not None and one.prompt_tokens]
    return Group(
        keys=keys,
        calls=len(calls),
        answered=len(done),
        failed=outcomes["failed"],
        cancelled=outcomes["cancelled"],
        unfinished=len(calls) - len(done) - outcomes["failed"] - outcomes["cancelled"],
        superseded=sum(one.superseded for one in calls),
        replayed=len(members) - len(calls),
        seconds=math.fsum(one.total or 0.0 for one in calls),
        queued=math.fsum(one.queued for one in calls),
        ttft=percentiles(one.ttft for one in done),
        total=percentiles(one.total for one in done),
        prompt=percentiles(one.prompt_tokens for one in calls),
        prompt_tokens=sum(one.prompt_tokens or 0 for one in calls),
        answer_tokens=sum(one.answer_tokens or 0 for one in calls),
        cached_share=_rate(sum(one.cached_tokens or 0 for one in cached), sum(one.prompt_tokens or 0 for one in cached)),
        decode_rate=_rate(sum(one.decode_tokens or 0 for one in done), math.fsum(one.decode_seconds or 0.0 for one in done)),
        prefill_rate=_rate(sum(one.prefill_tokens or 0 for one in done), math.fsum(one.prefill_seconds or 0.0 for one in done)),
        retries=sum(one.retries for one in calls),
        timeouts=sum(one.timeouts for one in calls),
        errors=dict(sorted(Counter(error for one in calls for error in one.errors).items())),
        trims=sum(one.trims for one in calls),
        trimmed_tokens=sum(one.trimmed_tokens for one in calls),
        saved_tokens=sum(one.saved_tokens for one in members),
    )


def _rate(part: Optional[float], whole: Optional[float]) -> Optional[float]:
    return part / whole if part is not None and whole else None
