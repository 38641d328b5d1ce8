"""What a call spent its time on, from its record in the journal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Optional

from metagpt_localllm.journal import CallRecord
from metagpt_localllm.statistics import known_number, mappings

__all__ = ["KINDS", "Attempt", "Phase", "attempts_of", "phases_of"]

#: The kinds of phases, in the order in which they are drawn over each other, with what a reader is told.
KINDS: Mapping[str, str] = {
    "queued": "waiting for its turn",
    "pause": "before and between attempts",
    "prefill": "time to first token (prefill)",
    "decode": "decode",
    "open": "broken off, or no end recorded",
    "failed": "failed attempt",
}


@dataclass(frozen=True)
class Phase:
    """A stretch of a call. ``kind`` is one of KINDS; both moments in seconds since 1970."""

    kind: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Attempt:
    """One request of a call. Moments in seconds since 1970, the others in seconds; None: not known.

    Attributes:
        prompt_tokens: may be an estimate.
        deadline: for its first token.
        tokens: of the answer, that had come.
        error: class name; empty where it did not fail.
        detail: the sentence that says what happened.
    """

    at: float
    ended: Optional[float]
    prompt_tokens: Optional[int]
    deadline: Optional[float]
    ttft: Optional[float]
    tokens: int
    error: str
    detail: str

    @property
    def seconds(self) -> float:
        """That it lasted; 0 where its end is not known."""
        return max((self.ended or self.at) - self.at, 0.0)


def attempts_of(call: CallRecord) -> list[Attempt]:
    """The attempts of a call in their order; what a damaged record makes no sense of is left out."""
    found = []
    for one in mappings(call.attempts):
        at = known_number(one.get("at"))
        if at is not None:
            deadlines, prompt = one.get("deadlines"), known_number(one.get("prompt_tokens"))
            found.append(
                Attempt(
                    at=at,
                    ended=known_number(one.get("ended")),
                    prompt_tokens=None if prompt is None else int(prompt),
                    deadline=known_number(deadlines.get("first_token")) if isinstance(deadlines, Mapping) else None,
                    ttft=known_number(one.get("ttft")),
                    tokens=int(known_number(one.get("tokens")) or 0),
                    error=str(one.get("error") or ""),
                    detail=str(one.get("detail") or ""),
                )
            )
    return found


def phases_of(call: CallRecord, until: float) -> list[Phase]:
    """The phases of a call in their order, without gaps.

    The journal has one figure for all its waits for a turn: it is taken to lie right before the attempts, the first ones first.

    Args:
        until: how long a call lasted at the least that has no end, as one that was killed; seconds since 1970.
    """
    attempts, found, now = attempts_of(call), [], call.started
    waited = known_number(call.queued) or 0.0
    ended = known_number(call.ended)

    def reach(kind: str, end: float) -> None:
        nonlocal now
        if end > now:
            found.append(Phase(kind, now, end))
            now = end

    for index, attempt in enumerate(attempts):
        turn = min(max(attempt.at - now, 0.0), waited)
        waited -= turn
        reach("pause", attempt.at - turn)
        reach("queued", attempt.at)
        is_last = index == len(attempts) - 1
        end = attempt.ended or ((ended or until) if is_last else attempts[index + 1].at)
        if attempt.error:
            reach("failed", end)
        elif is_last and call.outcome == "done":
            reach("prefill", end if attempt.ttft is None else min(attempt.at + attempt.ttft, end))
            reach("decode", end)
        else:
            found.append(Phase("open", now, max(now, end)))  # even where it is not known to have lasted
            now = max(now, end)
    if ended is not None:
        reach("pause", ended)
    return found
