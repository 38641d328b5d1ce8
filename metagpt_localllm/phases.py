"""What each call is doing, in words, from its events: what the live lines, the log and a notebook show. Pure: time is passed in.

A view says who asks, the phase, how much of it is done, and which deadline comes next. Where the server tells nothing of its
prefill, share and remaining time come from what was learned, and are marked with "about".
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import Callable, Deque, Mapping, Optional

from metagpt_localllm import events
from metagpt_localllm.events import CallInfo, Event
from metagpt_localllm.wording import counted, printable

__all__ = ["Board", "Phase", "View", "clock"]

#: Seconds over which the speed of an answer is taken, and between two notes of how far it was.
_WINDOW, _NOTE = 15.0, 0.25
#: Seconds of silence, and share of the deadline for it, from which on that deadline is the next one and not the total.
_CALM, _CALM_SHARE = 5.0, 0.25
#: Share of the prompt that must have been read before its speed says when the rest will be.
_TELLING = 0.02


class Phase(enum.Enum):
    QUEUED = "queued"
    LOADING = "loading"
    PREFILL = "prefill"
    GENERATING = "generating"
    STALLED = "stalled"
    RETRY = "retry"
    WAITING = "waiting"


@dataclass(frozen=True)
class View:
    """A call as it stands.

    Attributes:
        number: of the call in its process.
        role, action: who asks; either may be "".
        phase: what it is doing.
        words: the phase with its figures, and ``short`` the same for a narrow terminal.
        attempt: "attempt 2 of 4", or "" for the first and where ``words`` say it.
        elapsed: seconds since the call began, its wait for a turn included.
        deadline: name of the deadline that comes next, or "".
        left: seconds until then, or None.
    """

    number: int
    role: str
    action: str
    phase: Phase
    words: str
    short: str
    attempt: str
    elapsed: float
    deadline: str
    left: Optional[float]

    @property
    def who(self) -> str:
        return " ".join(part for part in (self.role, self.action) if part) or f"call {self.number}"


def clock(seconds: float) -> str:
    """``seconds`` for a line: 8 s, 3:10, 1:02:03."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Board:
    """The calls that run. Only beginnings and ends change which there are; the caller sees to it that these do not overlap.

    Args:
        late: seconds by which events may be late, as those of another process are.
    """

    def __init__(self, late: float = 0.0) -> None:
        self._late = late
        self._calls: dict[int, _Running] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def take(self, event: Event, now: float) -> bool:
        """Notes an event. ``now``: seconds of any clock that only goes forward.

        Returns:
            Whether a call's phase has changed, or a call has begun or ended.
        """
        call = self._calls.get(event.call.number)
        if isinstance(event, events.Token):  # first, for there are many
            if call is None:
                call = self._begin(event.call, now)
            return call.token(event.tokens, now)
        if isinstance(event, _ENDS):
            if call is not None:
                del self._calls[event.call.number]
                for other in list(self._calls.values()):
                    other.one_less_ahead(event.call.model)
            return call is not None
        take = _TAKES.get(type(event))
        if take is None or (call is None and isinstance(event, events.Working)):
            return False
        if call is None:
            call = self._begin(event.call, now)
        before = call.phase, call.attempt
        take(call, event, now)
        return call.fresh() or (call.phase, call.attempt) != before

    def views(self, now: float) -> list[View]:
        """All calls, the oldest first."""
        return [call.view(now) for call in list(self._calls.values())]

    def view(self, number: int, now: float) -> Optional[View]:
        """One call; None where it has ended."""
        call = self._calls.get(number)
        return call.view(now) if call is not None else None

    def _begin(self, info: CallInfo, now: float) -> _Running:
        call = self._calls[info.number] = _Running(info, now, self._late)
        return call


class _Running:
    """One call, as its events have told."""

    def __init__(self, info: CallInfo, now: float, late: float) -> None:
        self.info, self.late = info, late
        self.started = self.since = self.sent_at = self.alive_at = now
        self.phase = Phase.QUEUED
        self.ahead = 0
        self.attempt, self.attempts = 0, 0
        self.sent: Optional[events.Sent] = None
        self.proved = False  # the server has shown that it works, since the request went out
        self.usual: Optional[float] = None
        self.limit = 0.0
        self.read: Deque[tuple[float, int]] = deque(maxlen=64)  # of the prompt, by time
        self.total = 0
        self.tokens = 0
        self.notes: Deque[tuple[float, int]] = deque()  # tokens of the answer, by time
        self._fresh = True

    def fresh(self) -> bool:
        """Whether this is the first time that it is asked."""
        fresh, self._fresh = self._fresh, False
        return fresh

    def one_less_ahead(self, model: str) -> None:
        """Another call has ended."""
        if self.phase is Phase.QUEUED and model == self.info.model:
            self.ahead = max(self.ahead - 1, 1)

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase, self.since = phase, now

    # ------------------------------------------------------------------ events

    def on_queued(self, event: events.Queued, now: float) -> None:
        self.ahead = event.ahead
        self._enter(Phase.QUEUED, now)

    def on_loading(self, event: events.Loading, now: float) -> None:
        self.usual, self.limit = event.usual, event.limit
        self._enter(Phase.LOADING, now)

    def on_waiting(self, event: events.Waiting, now: float) -> None:
        self.limit = event.limit
        self._enter(Phase.WAITING, now)

    def on_retry(self, event: events.Retry, now: float) -> None:
        self.attempt, self.attempts, self.limit = event.attempt, event.attempts, event.delay
        self._enter(Phase.RETRY, now)

    def on_sent(self, event: events.Sent, now: float) -> None:
        self.sent, self.attempt, self.attempts = event, event.attempt, event.attempts
        self.sent_at = self.alive_at = now
        self.proved, self.tokens, self.total = False, 0, event.prompt_tokens
        self.read.clear()
        self.notes.clear()
        self._enter(Phase.PREFILL, now)

    def on_continued(self, event: events.Continued, now: float) -> None:
        self.tokens = event.tokens

    def on_prefill(self, event: events.Prefill, now: float) -> None:
        if not self.read or event.processed > self.read[-1][1]:
            self.read.append((now, event.processed))
            self.alive_at, self.proved = now, True
        self.total = event.total
        if self.phase is not Phase.PREFILL:
            self._enter(Phase.PREFILL, now)

    def on_working(self, event: events.Working, now: float) -> None:
        self.alive_at, self.proved = now, True

    def on_stalled(self, event: events.Stalled, now: float) -> None:
        self.limit = event.limit
        if self.phase is not Phase.STALLED:
            self.alive_at = now - event.silence
            self._enter(Phase.STALLED, self.alive_at)

    def token(self, tokens: int, now: float) -> bool:
        self.tokens, self.alive_at = tokens, now
        notes = self.notes
        if self.phase is not Phase.GENERATING:
            self._enter(Phase.GENERATING, now)
            notes.clear()
            notes.append((now, tokens))
            return True
        if now - notes[-1][0] >= _NOTE:
            notes.append((now, tokens))
            while len(notes) > 2 and now - notes[1][0] >= _WINDOW:
                notes.popleft()
        return False

    # ------------------------------------------------------------------ what is to be seen

    def view(self, now: float) -> View:
        words, short = _WORDS[self.phase](self, now)
        deadline, left = self._deadline(now)
        attempt = ""
        if self.attempt > 1 and self.phase is not Phase.RETRY:
            attempt = f"attempt {self.attempt}" + (f" of {self.attempts}" if self.attempt <= self.attempts else "")
        info = self.info
        return View(
            info.number, printable(info.role), printable(info.action), self.phase, words, short, attempt,
            max(now - self.started, 0.0), deadline, left,
        )  # fmt: skip

    def queued(self, now: float) -> _Words:
        if not self.ahead:
            return "getting ready", "getting ready"
        return f"waiting for its turn behind {self.ahead}", f"queued behind {self.ahead}"

    def loading(self, now: float) -> _Words:
        if not self.usual:
            return "server loading", "loading"
        share, eta = _guess(now - self.since, self.usual)
        return f"server loading, about {_percent(share)}{_eta(eta)}", f"loading ~{_percent(share)}"

    def prefill(self, now: float) -> _Words:
        expected = self.sent.expected if self.sent is not None else None
        if self.read and self.total:
            share = min(self.read[-1][1] / self.total, 1.0)
            eta, about = self._until_read(now), ""
            if eta is None and expected and share < 1:
                eta, about = _guess(now - self.sent_at, expected)[1], "about "
            return f"prefill {_percent(share)}{_eta(eta, about)}", f"prefill {_percent(share)}"
        if not expected:
            return f"prefill of {self.total:,} tokens" if self.total else "prefill", "prefill"
        share, eta = _guess(now - self.sent_at, expected)
        if share < 0.01 and eta is not None and self.total:
            return f"prefill of {self.total:,} tokens{_eta(eta, 'about ')}", f"prefill ~{clock(eta)}"
        return f"prefill about {_percent(share)}{_eta(eta)}", f"prefill ~{_percent(share)}"

    def generating(self, now: float) -> _Words:
        speed = self._speed()
        tokens = counted(self.tokens, "token")
        if speed is None:
            return f"generating {tokens}", tokens
        return f"generating {tokens} at {speed:.1f} tok/s", f"{self.tokens:,} tok, {speed:.1f}/s"

    def stalled(self, now: float) -> _Words:
        silence = now - self.since
        if self.alive_at > self.since:
            return f"no token for {clock(silence)}, but the server works", f"no token {clock(silence)}"
        told = f"stalled {clock(silence)} of {clock(self.limit)}"
        return told, told

    def retry(self, now: float) -> _Words:
        following = self.attempt + 1
        of = f" of {self.attempts}" if following <= self.attempts else ""
        left = self.since + self.limit - now
        wait = f" in {clock(left)}" if left >= 0.5 else ""
        return f"retry {following}{of}{wait}", f"retry {following}{of.replace(' of ', '/')}{wait}"

    def waiting(self, now: float) -> _Words:
        waited = f"{clock(now - self.since)} of {clock(self.limit)}"
        return f"server down: waiting {waited}", f"down {waited}"

    def _until_read(self, now: float) -> Optional[float]:
        """Seconds, by how fast the prompt was read of late."""
        (first, begun), (last, done) = self.read[0], self.read[-1]
        if done - begun < _TELLING * self.total or last <= first or done >= self.total:
            return None
        return max((self.total - done) * (last - first) / (done - begun) - (now - last), 0.0)

    def _speed(self) -> Optional[float]:
        """Tokens per second of late."""
        since, before = self.notes[0] if self.notes else (0.0, self.tokens)
        passed = self.alive_at - since
        return (self.tokens - before) / passed if passed >= _NOTE and self.tokens > before else None

    def _deadline(self, now: float) -> tuple[str, Optional[float]]:
        if self.phase is Phase.WAITING:
            return "wait_for_server", max(self.since + self.limit - now, 0.0)
        if self.phase is Phase.LOADING:
            return "limit", max(self.since + self.limit - now, 0.0)
        sent = self.sent
        if sent is None or self.phase in (Phase.QUEUED, Phase.RETRY):
            return "", None
        ends = {"total": self.sent_at + sent.total}
        if sent.remaining is not None:
            ends["timeout"] = self.sent_at + sent.remaining
        if self.phase is Phase.PREFILL:
            name = "first_token"
            limit = sent.progress if self.read and sent.progress is not None else sent.first_token
            flows = self.proved
        else:
            name, limit, flows = "stall", sent.stall, self.phase is Phase.GENERATING
        # As long as the server shows life, the deadline for its silence only begins anew.
        if not flows or now - self.alive_at >= min(_CALM, _CALM_SHARE * limit) + self.late:
            ends[name] = self.alive_at + limit
        first = min(ends, key=lambda each: ends[each])
        return first, max(ends[first] - now, 0.0)


#: The phase with its figures, and the same for a narrow terminal.
_Words = tuple[str, str]
_WORDS: Mapping[Phase, Callable[[_Running, float], _Words]] = {
    Phase.QUEUED: _Running.queued,
    Phase.LOADING: _Running.loading,
    Phase.PREFILL: _Running.prefill,
    Phase.GENERATING: _Running.generating,
    Phase.STALLED: _Running.stalled,
    Phase.RETRY: _Running.retry,
    Phase.WAITING: _Running.waiting,
}
_TAKES: Mapping[type, Callable[..., None]] = {
    events.Queued: _Running.on_queued,
    events.Loading: _Running.on_loading,
    events.Waiting: _Running.on_waiting,
    events.Retry: _Running.on_retry,
    events.Sent: _Running.on_sent,
    events.Continued: _Running.on_continued,
    events.Prefill: _Running.on_prefill,
    events.Working: _Running.on_working,
    events.Stalled: _Running.on_stalled,
}
_ENDS = (events.Done, events.Failed, events.Replayed, events.Cancelled)


def _guess(passed: float, usual: float) -> tuple[float, Optional[float]]:
    """Share and seconds that remain of something that usually takes so long; never all of it."""
    return min(max(passed, 0.0) / usual, 0.99), usual - passed if passed < usual else None


def _percent(share: float) -> str:
    return f"{int(share * 100)} %"


def _eta(seconds: Optional[float], about: str = "") -> str:
    return f", {about}{clock(seconds)} left" if seconds is not None else ""
