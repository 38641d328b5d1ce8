"""What happens to a call, as typed events for whoever wants to see it: the log, the demo, a UI.

Nothing in the package prints by itself; it publishes here, and subscribers do as they like.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Union

from metagpt_localllm.tiers import Caller

__all__ = [
    "CallInfo", "Continued", "Done", "Event", "Failed", "Queued", "Replayed", "Retry", "Sent", "Trimmed", "Waiting", "publish",
    "subscribe",
]  # fmt: skip


@dataclass(frozen=True)
class CallInfo:
    """The call an event belongs to.

    Attributes:
        number: counts the calls of this process, from 1.
        model: name of the model.
        caller: the action and role that ask.
        tier: name of the tier the deadlines come from.
    """

    number: int
    model: str
    caller: Caller
    tier: str

    @property
    def action(self) -> str:
        return self.caller.action

    @property
    def role(self) -> str:
        return self.caller.profile or self.caller.role


@dataclass(frozen=True)
class Queued:
    """The call waits for its turn on our side; ``ahead``: how many run or wait before it."""

    call: CallInfo
    ahead: int


@dataclass(frozen=True)
class Sent:
    """A request went out.

    Attributes:
        attempt: counts from 1.
        prompt_tokens: may be an estimate.
        first_token, stall, total: its deadlines in seconds.
        why: how those that were learned came about, by name.
    """

    call: CallInfo
    attempt: int
    prompt_tokens: int
    first_token: float
    stall: float
    total: float
    why: Mapping[str, str]


@dataclass(frozen=True)
class Retry:
    """An attempt failed and another follows after ``delay`` seconds. ``cause`` names the error class."""

    call: CallInfo
    attempt: int
    cause: str
    detail: str
    delay: float


@dataclass(frozen=True)
class Waiting:
    """The server is not up, or loads: no attempt is spent. Both in seconds."""

    call: CallInfo
    cause: str
    limit: float


@dataclass(frozen=True)
class Trimmed:
    """The prompt was made to fit the context window.

    Attributes:
        dropped_messages: left out whole.
        shortened_messages: those that lost a part of their text.
        replaced_messages: those that gave way to one line.
        removed_tokens: by how much it is shorter.
        prompt_tokens: that remain.
        budget: tokens that a prompt may have: the window less what is reserved for the answer.
        window: the context window in tokens.
    """

    call: CallInfo
    dropped_messages: int
    shortened_messages: int
    replaced_messages: int
    removed_tokens: int
    prompt_tokens: int
    budget: int
    window: int


@dataclass(frozen=True)
class Continued:
    """The attempt goes on with what there is of the answer: ``tokens``, which are not decoded again."""

    call: CallInfo
    attempt: int
    tokens: int


@dataclass(frozen=True)
class Replayed:
    """The answer is an earlier run's, from the journal; ``number``: of the call there, ``tokens``: that were not decoded again."""

    call: CallInfo
    number: int
    tokens: int


@dataclass(frozen=True)
class Done:
    """The answer is whole. Times in seconds; ``ttft`` (time to first token) and ``longest_gap`` are of the last attempt.

    Attributes:
        cut_by: what ended an answer whose finish_reason is "length": "max_tokens", "window", or a limit of the
            "server"'s own; "" for another.
        changed_messages: of the conversation, left out of the prompt or shortened, by this call or an earlier one.
    """

    call: CallInfo
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    ttft: Optional[float]
    longest_gap: float
    elapsed: float
    cut_by: str = ""
    changed_messages: int = 0


@dataclass(frozen=True)
class Failed:
    """The call ends without an answer."""

    call: CallInfo
    attempts: int
    cause: str
    detail: str
    elapsed: float


Event = Union[Queued, Sent, Continued, Replayed, Retry, Waiting, Trimmed, Done, Failed]

_subscribers: list[Callable[[Event], None]] = []
_log = logging.getLogger(__name__)


def subscribe(callback: Callable[[Event], None]) -> Callable[[], None]:
    """Calls ``callback`` with every event from now on, until the returned function is called.

    It runs on the event loop of the call and must not block. An exception in it harms no call.
    """
    _subscribers.append(callback)

    def unsubscribe() -> None:
        if callback in _subscribers:
            _subscribers.remove(callback)

    return unsubscribe


def publish(event: Event) -> None:
    for callback in tuple(_subscribers):
        try:
            callback(event)
        except Exception:
            _log.debug("a subscriber of metagpt_localllm.events failed", exc_info=True)
