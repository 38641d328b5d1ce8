"""How long this server, model and prompt will take, learned from the calls before. Pure: nothing is read or written here.

A deadline is a stated quantile of a prediction, times a margin, between a floor and a ceiling::

    first_token 212s = 3,110 uncached tokens / 18.4 tok/s (q99 of 41 calls) × 1.25

The problem is TCP's retransmission time-out, and RFC 6298 (SRTT + 4 · RTTVAR, at least a second, doubled after a
time-out) is the form to start from. What is kept, and what differs:

- **Misses are ratios.** A segment's round trip hardly depends on the segment; prefill grows with the prompt. So what is
  followed is the cost of a token, what is spread is the logarithm of actual over predicted, made *before* the call was
  known. Cost rises with the position in the context, since each token attends to all before it; how steeply differs
  between engines, so a few slopes are tried side by side and the one that lately predicted best is used.
- **A quantile, no mean + 4 · deviation.** Latency has a heavy tail: a mean is dragged by it and a deviation is not its
  quantile. The middle is a weighted median (newest call 25 %, so three calls outvote the rest and one does not), the
  quantile is Student's for few calls and at least the second largest miss of late for many.
- **Waiting is added, not multiplied.** A queue behind another client or a model load does not depend on our prompt, and
  cannot be foreseen: the longest of late is added.
- **The margin is asymmetric.** A false time-out costs a whole prefill, on a machine that is slow already; a late one only
  waiting. TCP's retransmission costs a packet.
- **Karn's rule** (Karn and Partridge 1987; RFC 6298, section 3): how long a retry took says nothing about a first try,
  here because the prompt is in the server's prefix cache by then. It is learned from only if the server said how much
  was cached. As in TCP a time-out doubles the deadline until a call that can be learned from; until then no deadline is
  shorter than the time that has not been enough, scaled to the work.

Sources: RFC 6298 (https://www.rfc-editor.org/rfc/rfc6298); P. Karn, C. Partridge, "Improving Round-Trip Time Estimates in
Reliable Transport Protocols", SIGCOMM '87; J. Dean, L. Barroso, "The Tail at Scale", CACM 56(2), 2013, for the tail. The
constants were tuned with bench/deadlines.py on its seeds 1 to 3 and 11 to 16, and checked on 21 to 30.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import Any, Deque, Iterable, Mapping, Optional, Tuple

__all__ = ["DEFAULTS", "Estimate", "Estimator", "Learned", "Limits", "Sample", "deadline"]

#: The quantile that is predicted, and its place in a normal distribution in standard deviations.
_QUANTILE, _Z = 0.99, 2.326
#: Weight of a call relative to the one after it: the last three calls of a steady stream weigh 58 %.
_KEEP = 0.75
#: Calls that the middle and the spread are taken from.
_MIDDLE_CALLS, _SPREAD_CALLS = 16, 64
#: Before anything is known: the standard deviation of ln(actual / predicted), and how many calls that belief weighs.
_PRIOR_SPREAD, _PRIOR_CALLS = 0.35, 3
#: The spread is never believed to be smaller, nor the quantile to be further from the middle (in logarithms).
_LEAST_SPREAD, _MOST = 0.1, math.log(20)
#: A miss counts as a multiple at most so far; what is beyond is more likely a wait.
_LARGEST_MULTIPLE = math.log(2)
#: Where a prompt is larger than any of late, the quantile grows by this power of how much.
_EXTRAPOLATION = 0.2
#: Slopes: the part by which a token's cost grows per token before it. 0: as if attention were free; 1/16,384 for a 30B model.
_SLOPES = (1 / 16384, 1 / 32768, 1 / 8192, 0.0, 1 / 4096)
#: What a request costs besides its tokens (template, the first token's decode), as that many tokens.
_OVERHEAD = 16.0
#: Calls of fewer tokens say less about speed: one of so many has half the weight.
_HALF_WEIGHT = 128.0
#: Seconds for a load where none was seen: what Ollama gives it (OLLAMA_LOAD_TIMEOUT, 5m).
_UNKNOWN_LOAD = 300.0
#: Nothing that is measured here is larger, be it seconds or tokens.
_ABSURD = 1e8


@dataclass(frozen=True)
class Sample:
    """One attempt as it went. Times are in seconds; None is for what is not known.

    Attributes:
        prompt_tokens: of the whole prompt.
        cached_tokens: of these, from the prefix cache; None where the server does not say.
        shared_tokens: of these, the beginning that is the same as in a prompt sent before, so that they may have been cached.
        ttft: from sent to the first token; None where none came.
        waited: the part of it that was provably the queue or the loading of the model.
        prefill_seconds: as the server itself reports it (llama.cpp's prompt_ms, Ollama's prompt_eval_duration).
        answer_tokens: that came.
        decode_seconds: from the first token to the last.
        longest_gap: between two tokens.
        censored: the deadline that ended it: first_token, stall or total; None where none did.
        elapsed: where censored, the silence or the time that was not enough.
        attempt: 1 is the first try.
        load: the model was loaded during it.
    """

    prompt_tokens: int
    cached_tokens: Optional[int] = None
    shared_tokens: int = 0
    ttft: Optional[float] = None
    waited: float = 0.0
    prefill_seconds: Optional[float] = None
    answer_tokens: int = 0
    decode_seconds: Optional[float] = None
    longest_gap: Optional[float] = None
    censored: Optional[str] = None
    elapsed: float = 0.0
    attempt: int = 1
    load: bool = False

    def as_row(self) -> dict[str, Any]:
        """Plain values by name, for JSON or a table."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sample:
        """The sample that ``as_row`` gave; what this version does not know, by its name or its type, is left out."""
        known = {field.name for field in fields(cls)}
        sound: dict[str, Any] = {
            name: value
            for name, value in row.items()
            if name in known and (value is None or isinstance(value, str if name == "censored" else (int, float)))
        }
        return cls(**{"prompt_tokens": 0, **sound})


@dataclass(frozen=True)
class Estimate:
    """A prediction.

    Attributes:
        seconds: the quantile, without a margin.
        expected: seconds, the median.
        quantile: which one ``seconds`` is.
        calls: that it rests on.
        why: what ``seconds`` is made of, such as "3,110 uncached tokens / 18.4 tok/s".
        in_vain: seconds that were not enough since the last call that taught something, for as much work; 0 if none.
    """

    seconds: float
    expected: float
    quantile: float
    calls: int
    why: str
    in_vain: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What turns an estimate into a deadline.

    Attributes:
        floor: seconds, never less.
        ceiling: seconds, never more.
        cold: seconds where nothing is learned yet.
        margin: factor on the estimate's quantile.
    """

    floor: float
    ceiling: float
    cold: float
    margin: float


#: In seconds. A first token may take two hours, once something is learned, since a prompt may be huge.
DEFAULTS: Mapping[str, Limits] = {
    "first_token": Limits(floor=30, ceiling=7200, cold=600, margin=3.0),
    "stall": Limits(floor=20, ceiling=300, cold=60, margin=4.0),
    "total": Limits(floor=300, ceiling=86400, cold=7200, margin=2.0),
    # Silence between two signs of work (prefill progress, tokens) of a server whose health is probed and answers:
    # deaths are mostly proven by the probe, so this can be patient.
    "progress": Limits(floor=50, ceiling=7200, cold=600, margin=6.0),
}


@dataclass(frozen=True)
class Learned:
    """A deadline in seconds, and the sentence that explains it."""

    seconds: float
    why: str


def deadline(name: str, estimate: Optional[Estimate], limits: Limits, *, backoff: float = 1.0) -> Learned:
    """The deadline ``name``: estimate × margin × backoff between floor and ceiling; ``limits.cold`` without an estimate.

    What was waited in vain counts without the margin, so that a time-out doubles the deadline and no more.

    Args:
        backoff: factor for time-outs since the last call that taught something (``Estimator.backoff``); counts for a
            cold start too, up to the ceiling.
    """
    factor = backoff if 1.0 <= backoff < _ABSURD else 1.0
    times = f" × {factor:g} after a time-out" if factor > 1 else ""
    if estimate is None:
        seconds = min(max(limits.cold * factor, limits.floor), limits.ceiling)
        return Learned(seconds, f"{name} {_s(seconds)}: nothing learned yet{times}")
    wanted = max(estimate.seconds * limits.margin, estimate.in_vain) * factor
    seconds = min(max(wanted, limits.floor), limits.ceiling)
    calls = "1 call" if estimate.calls == 1 else f"{estimate.calls} calls"
    why = f"{estimate.why} (q{100 * estimate.quantile:g} of {calls}) × {limits.margin:g}{times}"
    if estimate.in_vain > estimate.seconds * limits.margin:
        why = f"{_s(estimate.in_vain)} in vain{times}"
    if seconds > wanted:
        why += f" = {_s(wanted)}, but at least {_s(limits.floor)}"
    elif seconds < wanted:
        why += f" = {_s(wanted)}, but at most {_s(limits.ceiling)}"
    return Learned(seconds, f"{name} {_s(seconds)} = {why}")


class Estimator:
    """What is known about one model on one server.

    Args:
        samples: earlier ones, the oldest first; the last 200 are plenty.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._prefill = [_Level() for _ in _SLOPES]  # ln(seconds per unit of work), by slope
        self._best = 0
        self._decode = _Level()  # ln(seconds per token)
        self._gaps = _Level()  # ln(longest gap of a call)
        self._works: Deque[float] = deque(maxlen=_MIDDLE_CALLS)
        self._waits: Deque[float] = deque(maxlen=_SPREAD_CALLS)  # seconds, proven
        self._excess: Deque[float] = deque(maxlen=_SPREAD_CALLS)  # seconds beyond the prediction, unexplained
        self._loads: Deque[float] = deque(maxlen=8)  # seconds
        self._hits: Deque[float] = deque(maxlen=_MIDDLE_CALLS)  # cached / shared
        self._timeouts = {"first_token": 0, "stall": 0, "total": 0}
        self._in_vain: dict[str, Tuple[float, float]] = {}  # seconds that were not enough, for how much work
        for sample in samples:
            self.observe(sample)

    def observe(self, sample: Sample) -> None:
        """Learns from an attempt. Parts that make no sense (zero, negative, NaN, infinite) are left out."""
        prompt, cached, shared = _sound(sample.prompt_tokens), _sound(sample.cached_tokens), _sound(sample.shared_tokens)
        if sample.cached_tokens == 0:
            cached = 0.0
        if prompt is not None and cached is not None and cached <= prompt:
            if shared is not None and shared >= _HALF_WEIGHT and sample.attempt == 1:
                self._hits.append(min(cached / shared, 1.0))
        else:
            cached = None
        ttft = _sound(sample.ttft)
        if prompt is not None and ttft is not None:
            self._observe_first_token(sample, prompt, cached, min(shared or 0.0, prompt - 1), ttft)
        tokens, decoded, gap = _sound(sample.answer_tokens), _sound(sample.decode_seconds), _sound(sample.longest_gap)
        if tokens is not None and tokens > 1 and decoded is not None:
            self._decode.add(math.log(decoded / (tokens - 1)), tokens / (tokens + 32))
        if gap is not None and sample.censored != "stall":
            self._gaps.add(math.log(gap))
        if sample.censored is None and ttft is not None:
            self._forget_timeouts("total")
            if gap is not None:
                self._forget_timeouts("stall")
        elapsed = _sound(sample.elapsed)
        if sample.censored in self._timeouts and elapsed is not None and prompt is not None:
            self._timeouts[sample.censored] += 1
            uncached = prompt - (cached or 0.0)
            self._in_vain.setdefault(sample.censored, (elapsed, _work(uncached, prompt - uncached, _SLOPES[0])))

    def _observe_first_token(
        self, sample: Sample, prompt: float, cached: Optional[float], shared: float, ttft: float
    ) -> None:
        reported, waited = _sound(sample.prefill_seconds), _sound(sample.waited) or 0.0
        if reported is not None and reported <= 1.05 * ttft:
            seconds, waited = reported, max(waited, ttft - reported)
        else:
            seconds, reported = ttft - min(waited, ttft), None
        before = self._middle(prompt - (cached or 0.0), cached or 0.0)
        if sample.load:
            self._loads.append(waited if waited > 0 else max(ttft - (before or 0.0), 1.0))
            if reported is None and waited <= 0:
                return  # load and prefill cannot be told apart
        else:
            self._waits.append(waited)
        if seconds <= 0 or (sample.attempt != 1 and cached is None):
            return  # Karn's rule
        if cached is None:
            # Between nothing and all that is shared was cached: only a speed that this cannot explain is new.
            middle, slope = self._prefill[self._best].middle, _SLOPES[self._best]
            low = math.log(seconds / _work(prompt, 0.0, slope))
            high = math.log(seconds / _work(prompt - shared, shared, slope))
            if middle is not None and low <= middle <= high and shared > prompt / 5:
                self._forget_timeouts("first_token")
                return
            cached = 0.0 if middle is not None and middle < low else shared
        uncached = max(prompt - cached, 1.0)
        before = self._middle(uncached, cached)
        self._excess.append(seconds - before if before is not None and seconds > 1.5 * before else 0.0)
        weight = uncached / (uncached + _HALF_WEIGHT)
        for slope, level in zip(_SLOPES, self._prefill):
            level.add(math.log(seconds / _work(uncached, cached, slope)), weight)
        self._works.append(_work(uncached, cached, _SLOPES[0]))
        # The first slope is believed unless another is clearly better.
        self._best = min(range(len(_SLOPES)), key=lambda index: self._prefill[index].error + 0.01 * (index > 0))
        self._forget_timeouts("first_token")

    def _unexplained(self) -> float:
        """Seconds that a call may take beyond the prediction: the most of late where it happens often, as behind other clients."""
        often = sum(excess > 0 for excess in self._excess) >= 3
        return max(self._excess) if often else _second(self._excess)

    def _forget_timeouts(self, name: str) -> None:
        self._timeouts[name] = 0
        self._in_vain.pop(name, None)

    def _middle(self, uncached: float, cached: float) -> Optional[float]:
        middle = self._prefill[self._best].middle
        return None if middle is None else math.exp(middle) * _work(uncached, cached, _SLOPES[self._best])

    def backoff(self, name: str) -> float:
        """Factor on the deadline ``name``: doubled by each time-out since the last call that taught something, up to 64."""
        return 2.0 ** min(self._timeouts[name], 6)

    def cached_tokens(self, prompt_tokens: int, shared_tokens: int) -> int:
        """How many tokens of a prompt surely come from the cache, where ``shared_tokens`` were sent in one before.

        The least share of late; 0 where the server does not say what it caches.
        """
        shared = min(_sound(shared_tokens) or 0.0, (_sound(prompt_tokens) or 1.0) - 1)
        return int(shared * min(self._hits)) if self._hits else 0

    def first_token(
        self, uncached_tokens: int, *, cached_tokens: int = 0, may_load: bool = False, may_queue: bool = True
    ) -> Optional[Estimate]:
        """From sent to the first token, or to the next sign of prefill's progress.

        Args:
            uncached_tokens: to be processed until then.
            cached_tokens: before them in the context, cached or processed already.
            may_load: the model may have to be loaded first: it was not used for some time, or the server was started.
            may_queue: False once prefill has shown progress.
        """
        uncached = max(_sound(uncached_tokens) or 1.0, 1.0)
        cached = _sound(cached_tokens) or 0.0
        expected = self._middle(uncached, cached)
        if expected is None:
            return None
        level, work = self._prefill[self._best], _work(uncached, cached, _SLOPES[0])
        factor = max(level.above(), min(level.second_largest(), _LARGEST_MULTIPLE))
        prefill = max(expected * math.exp(factor), expected + self._unexplained())
        prefill *= max(work / max(self._works), 1.0) ** _EXTRAPOLATION
        why = f"{uncached:,.0f} uncached tokens / {uncached / prefill:.3g} tok/s"
        elapsed, of = self._in_vain.get("first_token", (0.0, 1.0))
        in_vain = elapsed * max(min(work / of, 8.0), 1.0)
        wait = max(self._waits, default=0.0) if may_queue else 0.0
        if wait > 1:
            why += f" + {_s(wait)} in the queue"
        load = 0.0
        if may_load:
            # One load says little about the next: the file may be in the page cache or not.
            load = max(self._loads) * (1 + 1 / len(self._loads)) if self._loads else _UNKNOWN_LOAD
            why += f" + {_s(load)} to load"
            expected += self.usual_load or 0.0  # one that was never seen is allowed for, but not foretold
        return Estimate(prefill + wait + load, expected, _QUANTILE, level.calls, why, in_vain)

    @property
    def usual_load(self) -> Optional[float]:
        """Seconds that loading the model has taken, the median of late; None where no load was seen."""
        return sorted(self._loads)[len(self._loads) // 2] if self._loads else None

    def stall(self) -> Optional[Estimate]:
        """The longest silence between two tokens of an answer."""
        level = self._gaps
        if level.middle is None:
            return None
        seconds = math.exp(level.middle + max(level.above(), level.second_largest()))
        why = f"{_s(seconds)} between two tokens"
        in_vain = self._in_vain.get("stall", (0.0, 0.0))[0]
        return Estimate(seconds, math.exp(level.middle), _QUANTILE, level.calls, why, in_vain)

    def total(
        self, uncached_tokens: int, answer_tokens: int, *, cached_tokens: int = 0, may_load: bool = False
    ) -> Optional[Estimate]:
        """From sent to the end of an answer of ``answer_tokens``."""
        first = self.first_token(uncached_tokens, cached_tokens=cached_tokens, may_load=may_load)
        level, tokens = self._decode, _sound(answer_tokens) or 1.0
        if first is None or level.middle is None:
            return None
        slow = math.exp(level.middle + max(level.above(), min(level.second_largest(), _LARGEST_MULTIPLE)))
        seconds = first.seconds + tokens * slow
        why = f"first token {_s(first.seconds)} + {tokens:,.0f} tokens / {1 / slow:.3g} tok/s"
        expected = first.expected + tokens * math.exp(level.middle)
        in_vain = self._in_vain.get("total", (0.0, 0.0))[0]
        return Estimate(seconds, expected, _QUANTILE, min(first.calls, level.calls), why, in_vain)


class _Level:
    """A logarithm that is followed: its middle, and how far the next value is from it.

    Attributes:
        middle: weighted median of the last values, or None.
        calls: values that the spread rests on.
        error: how far predictions were off of late, on average.
    """

    def __init__(self) -> None:
        self.middle: Optional[float] = None
        self.calls = 0
        self.error = 0.0
        self._values: Deque[Tuple[float, float]] = deque(maxlen=_MIDDLE_CALLS)
        self._misses: Deque[float] = deque(maxlen=_SPREAD_CALLS)

    def add(self, value: float, weight: float = 1.0) -> None:
        if self.middle is not None:
            miss = value - self.middle
            self._misses.append(miss)
            self.error += 0.05 * weight * (min(abs(miss), 0.5) - self.error)
        self._values.append((value, weight))
        self.calls = len(self._misses) + 1
        age, weighted = 1.0, []
        for value, weight in reversed(self._values):
            weighted.append((value, weight * age))
            age *= _KEEP
        self.middle = _weighted_median(weighted)

    def above(self) -> float:
        """The quantile's distance from the middle, from the typical miss."""
        count = len(self._misses)
        typical = sorted(abs(miss) for miss in self._misses)[count // 2] / 0.6745 if count else 0.0
        freedom = _PRIOR_CALLS + count
        spread = math.sqrt((_PRIOR_CALLS * _PRIOR_SPREAD**2 + count * typical**2) / freedom)
        # Student's quantile from the normal one (Abramowitz and Stegun 26.7.5, the first term).
        return min(_Z * (1 + (_Z**2 + 1) / (4 * freedom)) * max(spread, _LEAST_SPREAD), _MOST)

    def second_largest(self) -> float:
        """The second largest miss upwards of late: two in 64 are no accident, one may be."""
        return _second(self._misses)


def _second(values: Deque[float]) -> float:
    return max(sorted(values)[-2], 0.0) if len(values) > 1 else 0.0


def _weighted_median(values: list[Tuple[float, float]]) -> float:
    values.sort()
    half, so_far = sum(weight for _, weight in values) / 2, 0.0
    for value, weight in values:
        so_far += weight
        if so_far >= half:
            return value
    return values[-1][0]


def _work(uncached: float, cached: float, slope: float) -> float:
    """Prefill in units of a token at the beginning of an empty context."""
    return _OVERHEAD + uncached * (1 + slope * (cached + uncached / 2))


def _sound(value: object) -> Optional[float]:
    """The number, if it is one that a measurement can give."""
    if isinstance(value, (int, float)) and 0 < value < _ABSURD:
        return max(float(value), 1e-6)
    return None


def _s(seconds: float) -> str:
    return f"{seconds:,.0f}s" if seconds >= 10 else f"{seconds:.2g}s"
