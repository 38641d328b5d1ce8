"""The life of one call as a state machine. Pure: events and the time come in, the next step comes out.

::

    NEW ──send──▶ SENT ──progress──▶ PREFILL ──token──▶ DECODING ──finish──▶ ENDING ──whole──▶ DONE
                    │                   │                  │
                    └───────── fail / expire ──────────────┘
                                        │
              ┌─────────────────────────┼──────────────────────┐
              ▼                         ▼                      ▼
         BACKING_OFF ──send──▶   WAITING_FOR_SERVER ──send──▶  FAILED

``deadline`` is always the moment at which ``expire`` is due.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Callable, Optional, Union

from metagpt_localllm import errors
from metagpt_localllm.deadlines import Deadlines
from metagpt_localllm.failures import Failure, Kind

__all__ = ["BackOff", "CallLife", "GiveUp", "Phase", "SendAgain", "Step", "WaitForServer"]


#: Seconds in which usage and [DONE] may follow a finish_reason: they come at once or never.
_GRACE = 2.0


class Phase(enum.Enum):
    NEW = "new"
    SENT = "sent"  # on its way, in the server's queue, model loading, or in prefill that shows no progress
    PREFILL = "prefill"  # the server reports progress on the prompt
    DECODING = "decoding"  # tokens come
    ENDING = "ending"  # the finish_reason has come, usage may follow
    BACKING_OFF = "backing off"
    WAITING_FOR_SERVER = "waiting for the server"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class BackOff:
    """Pause for ``delay`` seconds, then send the same bytes again."""

    delay: float


@dataclass(frozen=True)
class WaitForServer:
    """Pause for ``pause`` seconds, poll until the server answers, at the longest until the moment ``until``; then send again."""

    until: float
    pause: float


@dataclass(frozen=True)
class SendAgain:
    """Send at once, changed as the failure says: trimmed further, or without a vendor's fields."""


@dataclass(frozen=True)
class GiveUp:
    """The call failed."""

    failure: Failure


Step = Union[BackOff, WaitForServer, SendAgain, GiveUp]


class CallLife:
    """One call from its first request to its answer or its error.

    Args:
        deadlines: of one attempt; ``send`` may bring others.
        attempts: requests at the most; those to a server that is not up are not counted.
        wait_for_server: seconds that the call may spend on a server that is not up or loading, in all.
        backoff: gives the pause in seconds after the n-th attempt.
        poll: shortest and longest pause in seconds before a server that was not up is asked again; they double
            as long as it claims to be up and then is not.
        now: the time, in seconds of any clock that only goes forward.
        call_timeout: seconds for the whole call, where the caller set a limit.
    """

    def __init__(
        self,
        deadlines: Deadlines,
        *,
        attempts: int,
        wait_for_server: float,
        backoff: Callable[[int], float],
        poll: tuple[float, float],
        now: float,
        call_timeout: Optional[float] = None,
    ) -> None:
        self.phase = Phase.NEW
        self.attempt = 0
        self.tokens = 0
        self.comments = 0
        self.started = self.sent_at = now
        self.first_token_at: Optional[float] = None
        self._deadlines = deadlines
        self._attempts = attempts
        self._patience = wait_for_server
        self._wait_limit = wait_for_server
        self._backoff = backoff
        self._poll = poll
        self._waits = 0
        self._call_timeout = call_timeout
        self.call_end = now + call_timeout if call_timeout else float("inf")
        self.last_token_at: Optional[float] = None
        self.longest_gap = 0.0
        self.waited = 0.0  # for its turns on our side
        self._alive_at = now
        self._waiting_since: Optional[float] = None
        self._processed = -1
        self._overflows = self._stricts = 0
        self._free = 0  # attempts that do not count

    @property
    def deadline(self) -> float:
        if self.phase is Phase.DECODING:
            limit = self._deadlines.stall
        elif self.phase is Phase.PREFILL:
            limit = self._deadlines.progress
        elif self.phase is Phase.ENDING:
            limit = min(self._deadlines.stall, _GRACE)
        else:
            limit = self._deadlines.first_token
        return min(self._alive_at + limit, self.sent_at + self._deadlines.total, self.call_end)

    @property
    def ttft(self) -> Optional[float]:
        """Seconds from the request to the first token of this attempt."""
        return None if self.first_token_at is None else self.first_token_at - self.sent_at

    def remaining(self, now: float) -> Optional[float]:
        """Seconds that the caller of the whole call still allows; None where it set no limit."""
        return self.call_end - now if self._call_timeout else None

    def silence(self, now: float) -> float:
        """Seconds since the last sign of life."""
        return now - self._alive_at

    def queued(self, seconds: float) -> None:
        """The call has waited for its turn on our side: that counts against no deadline."""
        self.call_end += seconds
        self.started += seconds
        self.waited += seconds
        if self._waiting_since is not None:
            self._waiting_since += seconds

    def send(self, now: float, deadlines: Optional[Deadlines] = None) -> None:
        """A request goes out."""
        self._deadlines = deadlines or self._deadlines
        if self._waiting_since is not None:
            self._patience -= now - self._waiting_since
            self._waiting_since = None
        self.phase = Phase.SENT
        self.attempt += 1
        self.sent_at = self._alive_at = now
        self.first_token_at = self.last_token_at = None
        self.longest_gap = 0.0
        self.tokens = self.comments = 0
        self._processed = -1

    def spend_attempt(self) -> None:
        """A probe hung: the server already holds one request of this call without an answer."""
        self._attempts = max(self._attempts - 1, 1)

    def progress(self, processed: int, now: float) -> None:
        """The server reports prefill; only a number that grows is a sign of life."""
        if processed > self._processed and self.phase in (Phase.SENT, Phase.PREFILL):
            self._processed = processed
            self._alive_at = now
            self.phase = Phase.PREFILL

    def work(self, now: float) -> None:
        """The server has proven that it works on something: short of ``total`` it is not cut off."""
        if self.phase in (Phase.SENT, Phase.PREFILL, Phase.DECODING):
            self._alive_at = now

    def token(self, now: float) -> None:
        if self.phase is not Phase.DECODING:
            self.phase = Phase.DECODING
            self.first_token_at = now
            self._waits = 0
        elif self.last_token_at is not None and now - self.last_token_at > self.longest_gap:
            self.longest_gap = now - self.last_token_at
        self._alive_at = self.last_token_at = now
        self.tokens += 1

    def finish(self, now: float) -> None:
        """The finish_reason has come: what still may follow has a short time, which nothing extends."""
        if self.phase is not Phase.ENDING:
            self.phase = Phase.ENDING
            self._alive_at = now

    def whole(self) -> None:
        self.phase = Phase.DONE

    def expire(self, now: float) -> Failure:
        """Names the deadline that has passed."""
        elapsed = now - self.sent_at
        settings = self._deadlines.settings
        if now >= self.call_end:
            what = f"the call took longer than the {self._call_timeout:g} s that its caller allowed (timeout=…)"
            return Failure(Kind.FATAL, errors.TotalTimeout, what, "The caller's own timeout ends it.")
        if now >= self.sent_at + self._deadlines.total:
            what = f"no whole answer within {elapsed:.1f} s (total{self._because('total')})"
            return Failure(
                Kind.TRANSIENT, errors.TotalTimeout, what, "Raise it if the model is merely slow.", settings["total"]
            )
        if self.phase is Phase.DECODING:
            silence = now - self._alive_at
            what = f"the stream went silent for {silence:.1f} s (stall{self._because('stall')}), {elapsed:.1f} s after the request"
            return Failure(
                Kind.TRANSIENT, errors.StreamStalled, what, "Raise it if the machine swaps.", settings["stall"]
            )
        what = f"no token within {now - self._alive_at:.1f} s (first_token{self._because('first_token')})"
        if self.phase is Phase.PREFILL:
            what += f" of the last progress at prompt token {self._processed:,}"
        if self.comments:
            what += f"; only {self.comments} keep-alive comments came, which show a connection but no work"
        remedy = "Raise it if the model is merely slow: queue, load and prefill count."
        return Failure(Kind.TRANSIENT, errors.FirstTokenTimeout, what, remedy, settings["first_token"])

    def _because(self, name: str) -> str:
        why = self._deadlines.why.get(name)
        return f"; {why}" if why else ""

    def fail(self, failure: Failure, now: float, *, gained: bool = False) -> Step:
        """What follows a failed attempt. ``gained``: the next one goes on with what this one has brought.

        Attempts that bring the answer forward are not counted: they repeat nothing, and the answer's length bounds them.
        """
        if failure.kind in (Kind.NOT_UP, Kind.LOADING):
            self.attempt -= 1
            self._patience -= now - self.sent_at
            if self._patience <= 0 or now >= self.call_end:
                return self.waited_in_vain(failure, now)
            self.phase = Phase.WAITING_FOR_SERVER
            self._waiting_since = now
            shortest, longest = self._poll
            pause = min(max(shortest, 0.01) * 2.0 ** min(self._waits, 30), max(longest, 0.01))
            self._waits += 1
            return WaitForServer(min(now + self._patience, self.call_end), pause)
        again = {Kind.OVERFLOW: 1, Kind.TRUNCATED: 2}.get(failure.kind, 0)
        if self._overflows < again:
            self._overflows += 1
            return SendAgain()
        if failure.kind is Kind.STRICT and self._stricts < 1:
            self._stricts += 1
            self.attempt -= 1
            return SendAgain()
        if failure.kind is Kind.CONTINUATION:
            self.attempt -= 1
            return SendAgain()
        if gained:
            self._free = self.attempt
        if failure.kind is not Kind.TRANSIENT or self.attempt - self._free >= self._attempts:
            return self._give_up(failure)
        delay = self._backoff(max(self.attempt - self._free, 1))
        if failure.retry_after is not None:
            delay = max(delay, min(failure.retry_after, self._deadlines.total))
        if now + delay >= self.call_end:
            return self._give_up(failure)
        self.phase = Phase.BACKING_OFF
        return BackOff(delay)

    def waited_in_vain(self, failure: Failure, now: float) -> GiveUp:
        """The server did not come up in time."""
        if now >= self.call_end:
            return self._give_up(self.expire(now))
        what = f"{failure.what}, not even after {self._wait_limit:g} s of waiting"
        return self._give_up(replace(failure, what=what))

    def _give_up(self, failure: Failure) -> GiveUp:
        self.phase = Phase.FAILED
        return GiveUp(failure)
