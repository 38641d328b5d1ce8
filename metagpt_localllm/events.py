"""What happens to a call, as typed events for whoever wants to see it: the log, the live lines, a UI.

Nothing in the package prints by itself; it publishes here, and subscribers do as they like::

    Queued* ─▶ Loading* ─▶ Sent ─▶ Prefill* ─▶ Token* ─▶ Done
                            ▲         │          │
                            │         ▼          ▼
                            └─ Retry | Waiting | Loading | Failed        (Stalled*, Trimmed*, Continued* on the way)

    Replayed                                                             (alone: nothing is sent)
    Cancelled                                                            (at any time: whoever asked wants no answer any more)
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Union, get_args

from metagpt_localllm.tiers import Caller

__all__ = [
    "FREQUENT", "KINDS", "CallInfo", "Cancelled", "Continued", "Done", "Event", "Failed", "Loading", "Prefill", "Queued", "Replayed", "Retry", "Sent",
    "Stalled", "Token", "Trimmed", "Waiting", "Working", "publish", "subscribe", "wanted",
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
        attempts: that there may be, of those that bring the answer no further.
        prompt_tokens: may be an estimate.
        expected: seconds until the first token, by what was learned; None before that.
        first_token, stall, total: its deadlines in seconds.
        why: how those that were learned came about, by name.
        progress: the deadline from one sign of prefill's progress to the next, in seconds.
        remaining: seconds that the caller of the whole call still allows; None where it set no limit.
    """

    call: CallInfo
    attempt: int
    attempts: int
    prompt_tokens: int
    expected: Optional[float]
    first_token: float
    stall: float
    total: float
    why: Mapping[str, str]
    progress: Optional[float] = None
    remaining: Optional[float] = None


@dataclass(frozen=True)
class Prefill:
    """The server has read so many ``processed`` tokens of the ``total`` of the prompt. Only some servers tell."""

    call: CallInfo
    processed: int
    total: int


@dataclass(frozen=True)
class Working:
    """A look at the silent server has proved that it works: the deadline for its silence begins anew."""

    call: CallInfo


@dataclass(frozen=True)
class Token:
    """The answer has grown.

    Attributes:
        tokens: of the answer until now, those included that an earlier attempt has brought.
        text: what has come; "" for a part of the reasoning or of a tool call.
    """

    call: CallInfo
    tokens: int
    text: str


@dataclass(frozen=True)
class Stalled:
    """No token has come for ``silence`` seconds; after ``limit`` the attempt ends. Comes again while it lasts."""

    call: CallInfo
    silence: float
    limit: float


@dataclass(frozen=True)
class Retry:
    """Attempt ``attempt`` failed and another follows after ``delay`` seconds. ``cause`` names the error class."""

    call: CallInfo
    attempt: int
    attempts: int
    cause: str
    detail: str
    delay: float


@dataclass(frozen=True)
class Waiting:
    """The server is not up, and is waited for, ``limit`` seconds at the most. No attempt is spent."""

    call: CallInfo
    cause: str
    limit: float


@dataclass(frozen=True)
class Loading:
    """The server loads the model, and is waited for, ``limit`` seconds at the most. No attempt is spent.

    Attributes:
        usual: seconds that it has taken before; None where that was not seen.
    """

    call: CallInfo
    cause: str
    limit: float
    usual: Optional[float]


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
    """The call ends without an answer.

    Attributes:
        cause: name of the error class.
        detail: the whole message of the error.
        what: what happened, alone.
        remedy: what helps, in a sentence, or "".
        setting: path of the setting in config2.yaml that changes it, or "".
        tokens: of the answer that had come.
    """

    call: CallInfo
    attempts: int
    cause: str
    detail: str
    elapsed: float
    what: str
    remedy: str
    setting: str
    tokens: int


@dataclass(frozen=True)
class Cancelled:
    """The call was ended from outside: a cancelled task, Ctrl-C, an event loop that was closed."""

    call: CallInfo


Event = Union[
    Queued, Loading, Sent, Prefill, Working, Token, Stalled, Continued, Replayed, Retry, Waiting, Trimmed, Done, Failed, Cancelled
]  # fmt: skip
Callback = Callable[[Event], None]
#: All kinds of events.
KINDS: tuple[type[Event], ...] = get_args(Event)
#: Those that come so often that they have to be asked for.
FREQUENT: tuple[type[Event], ...] = (Token, Working)

_subscribers: defaultdict[type[Event], list[Callback]] = defaultdict(list)
_log = logging.getLogger(__name__)


def subscribe(callback: Callback, *kinds: type[Event]) -> Callable[[], None]:
    """Calls ``callback`` with every event of these kinds from now on, until the returned function is called.

    It runs on the event loop of the call and must not block. An exception in it harms no call.

    Args:
        kinds: none for all but :class:`Token` and :class:`Working`, which come often and have to be asked for.
    """
    chosen = kinds or tuple(kind for kind in KINDS if kind not in FREQUENT)
    for kind in chosen:
        _subscribers[kind].append(callback)

    def unsubscribe() -> None:
        for kind in chosen:
            if callback in _subscribers[kind]:
                _subscribers[kind].remove(callback)

    return unsubscribe


def wanted(kind: type[Event]) -> bool:
    """Whether anybody would hear of such an event."""
    return bool(_subscribers.get(kind))


def publish(event: Event) -> None:
    for callback in tuple(_subscribers[type(event)]):
        try:
            callback(event)
        except Exception:
            _log.debug("a subscriber of metagpt_localllm.events failed", exc_info=True)
