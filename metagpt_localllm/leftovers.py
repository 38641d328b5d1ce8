"""What an unfinished run has left, given out again request by request. Pure."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any, Deque, Mapping, Optional, Sequence

from metagpt_localllm.fingerprint import Fingerprint, still_holds
from metagpt_localllm.journal import CallRecord

__all__ = ["Leftovers", "without_what_broke_it"]


def without_what_broke_it(calls: Sequence[CallRecord], outcome: str) -> Sequence[CallRecord]:
    """The calls of a run, without the last one and its repetitions where MetaGPT could make nothing of their answers.

    The same answers would end the run in the same way again. A run that was killed, or whose last call failed, has none.
    """
    if outcome != "failed" or not calls or calls[-1].outcome != "done":
        return calls
    end = len(calls)
    while end and calls[end - 1].digest == calls[-1].digest:
        end -= 1
    return calls[:end]


class Leftovers:
    """The answers that there are: the n-th identical request gets the n-th.

    Args:
        calls: in their order. Of an answer that broke off and was asked for again later with success, only the latter counts.
    """

    def __init__(self, calls: Sequence[CallRecord]) -> None:
        self._left: dict[str, Deque[CallRecord]] = defaultdict(deque)
        self._loose: dict[str, Deque[str]] = defaultdict(deque)
        done: set[str] = set()
        useful = []
        for call in reversed(calls):
            if call.outcome == "done" or (call.partial and call.request and call.digest not in done):
                useful.append(call)
            if call.outcome == "done":
                done.add(call.digest)
        self.count = len(useful)
        for call in reversed(useful):
            self._left[call.digest].append(call)
            self._loose[call.loose].append(call.digest)

    def take(self, asked: Fingerprint, wanted: int) -> tuple[Optional[CallRecord], bool]:
        """What is left for this request, which is then gone, and whether it may be used.

        Args:
            wanted: tokens that the answer may have.
        """
        digest = asked.exact
        if not self._left.get(digest):
            known = self._loose.get(asked.loose, ())
            digest = next((other for other in known if self._left.get(other)), "")
        if not self._left.get(digest):
            return None, False
        call = self._left[digest].popleft()
        if call.outcome != "done":
            return call, digest == asked.exact
        if digest != asked.exact and not still_holds(_said(call.answer or {}), call.volatile, asked.volatile):
            return call, False
        return call, not _was_cut(call, wanted)


def _said(answer: Mapping[str, Any]) -> str:
    """All text of an answer, as Answer.as_record has it."""
    calls = answer.get("tool_calls")
    called = [f"{call[2]} {call[3]}" for call in calls if isinstance(call, (list, tuple)) and len(call) == 4] if isinstance(calls, list) else ()
    return "\n".join([str(answer.get("content") or ""), str(answer.get("reasoning") or ""), " ".join(called)])


def _was_cut(call: CallRecord, wanted: int) -> bool:
    """Whether it might be longer now: it was cut, and not by the limit that there still is."""
    tokens = (call.usage or {}).get("completion_tokens")
    by_the_limit = isinstance(tokens, int) and tokens >= call.wanted_tokens - 1
    return call.finish_reason == "length" and (wanted > call.wanted_tokens or not by_the_limit)
