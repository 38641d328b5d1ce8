"""Faults by script: which request goes wrong, and how."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Optional

from metagpt_localllm.settings import parse_duration

__all__ = ["KINDS", "Fault", "parse_fault"]

#: Every kind of fault and what it does.
KINDS = {
    "hang": "accepts the request and never answers",
    "hang_after_headers": "sends the headers and then nothing",
    "keepalive_only": "sends the headers and then only SSE comments",
    "stall": "goes silent after so many tokens",
    "drop": "resets the connection after so many tokens",
    "close": "ends the stream after so many tokens, without finish_reason and [DONE]",
    "done_without_finish": "ends the stream after so many tokens with [DONE] and without finish_reason",
    "no_done": "ends a whole answer without [DONE], as transformers does",
    "no_usage": "leaves the usage out",
    "stream_error": "sends an error inside the stream after so many tokens",
    "empty": "ends the stream without anything in it",
    "loading": "answers 503 'Loading model' for a while",
    "busy": "answers 429 with Retry-After",
    "error": "answers with an HTTP status, 500 unless given",
    "html": "answers 504 with a page of HTML, as a proxy does",
    "reset": "resets the connection before any answer",
    "refuse": "crashes, refuses connections for a while, and then loads its model again",
    "truncate": "cuts a prompt over the context without a word, as Ollama does (lmstudio: a blank answer)",
}


@dataclass(frozen=True)
class Fault:
    """One fault of the script.

    Attributes:
        kind: one of KINDS.
        on: number of the first chat request it strikes, from 1.
        times: how many requests it strikes; None for all that follow.
        every: strikes only each so many requests from ``on``.
        after: tokens before it strikes, where it strikes in the stream.
        duration: seconds it lasts (loading, refuse), before scaling.
        status: of ``error``.
        retry_after: seconds that ``busy`` asks for, as sent (not scaled).
        match: strikes only requests whose text holds this.
    """

    kind: str
    on: int = 1
    times: Optional[int] = 1
    every: int = 1
    after: int = 3
    duration: float = 30.0
    status: int = 500
    retry_after: float = 1.0
    match: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(self.kind, KINDS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(sorted(KINDS))}"
            raise ValueError(f"there is no fault '{self.kind}'{hint}")

    def strikes(self, request: int, text: str) -> bool:
        """Whether it strikes the chat request of this number."""
        past = request - self.on
        if past < 0 or past % self.every or self.match not in text:
            return False
        return self.times is None or past // self.every < self.times


_NUMBERS = {"on": int, "every": int, "after": int, "status": int, "retry_after": float}


def parse_fault(text: str) -> Fault:
    """A fault from text such as ``stall:on=3,after=20`` or ``loading:duration=90s``.

    Raises:
        ValueError: an unknown kind or key, or a value of the wrong form.
    """
    kind, _, rest = text.partition(":")
    values: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or key not in (*_NUMBERS, "times", "duration", "match"):
            known = ", ".join([*_NUMBERS, "times", "duration", "match"])
            raise ValueError(f"'{part}' in the fault '{text}' is not key=value with a key of: {known}")
        try:
            if key == "times":
                values[key] = None if value == "always" else int(value)
            elif key == "duration":
                values[key] = parse_duration(value)
            else:
                values[key] = _NUMBERS[key](value) if key in _NUMBERS else value
        except ValueError:
            kind_of = "a duration" if key == "duration" else "a number"
            raise ValueError(f"in the fault '{text}', {key} must be {kind_of}, not '{value}'") from None
    return Fault(kind.strip(), **values)  # type: ignore[arg-type]
