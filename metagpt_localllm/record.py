"""One call in the journal: what an earlier run has left for it, and what becomes of it now."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Mapping, Optional, Sequence

from metagpt_localllm import events
from metagpt_localllm.answer import Answer
from metagpt_localllm.errors import LocalLLMError
from metagpt_localllm.fingerprint import Part, fingerprint
from metagpt_localllm.journal import CallRecord
from metagpt_localllm.session import Session
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint

__all__ = ["Record"]

#: Seconds between two checkpoints of an answer that streams.
_EVERY = 1.0
#: The same in scaled time, at the least.
_LEAST = 0.05


class Record:
    """What is written down of one call; nothing where there is no session.

    Attributes:
        left: what an earlier run has left for this request: a whole answer, or the beginning of one.
    """

    def __init__(
        self, session: Optional[Session], endpoint: Endpoint, body: Mapping[str, Any], caller: Caller, tier: str,
        parts: Sequence[Part], time_scale: float = 1.0,
    ) -> None:  # fmt: skip
        self._session = session
        self._every = max(_EVERY / time_scale, _LEAST)
        self.left: Optional[CallRecord] = None
        self._instead: Optional[CallRecord] = None
        self._number = 0
        self._saved_at = 0.0
        self._request: Optional[bytes] = None
        self._attempts: list[dict[str, Any]] = []
        if session is None:
            return
        asked, wanted = fingerprint(body, parts), int(body.get("max_tokens") or 0)
        self._instead, usable = session.recall(asked, wanted)
        self.left = self._instead if usable else None
        self._call = CallRecord(
            number=0, digest=asked.exact, loose=asked.loose, volatile=asked.volatile, action=caller.action,
            role=caller.profile or caller.role, tier=tier, model=endpoint.model, server=endpoint.address,
            started=time.time(), wanted_tokens=wanted,
        )  # fmt: skip

    @property
    def replay(self) -> Optional[CallRecord]:
        """The whole answer that an earlier run has left."""
        return self.left if self.left is not None and self.left.outcome == "done" else None

    @property
    def beginning(self) -> Optional[CallRecord]:
        """The beginning of an answer that an earlier run has left, with the request that it answers."""
        return self.left if self.left is not None and self.left.outcome != "done" else None

    def replayed(self, number: int, tokens: int) -> None:
        """The answer is given again that call ``number`` got."""
        if self._session is not None:
            self._session.replayed(number, tokens)

    def sent(self, request: bytes, deadlines: Mapping[str, float], prompt_tokens: int) -> None:
        """An attempt begins; ``request``: the body that the whole answer answers."""
        if self._session is None:
            return
        self._request = request
        self._saved_at = time.monotonic()
        self._attempts.append({"at": time.time(), "prompt_tokens": prompt_tokens, "deadlines": dict(deadlines)})
        if not self._number:
            self._number = self._session.begin(self._call, self._instead)

    def received(self, answer: Answer) -> None:
        """A token came: about once a second all of them are kept."""
        now = time.monotonic()
        if now - self._saved_at >= self._every:
            self._saved_at = now
            self._checkpoint(answer)

    def failed(self, answer: Answer, error: str, detail: str, ttft: Optional[float], longest_gap: float) -> None:
        """An attempt failed; what has come of the answer is kept."""
        if self._session is None or not self._attempts:
            return
        self._attempts[-1].update(error=error, detail=detail, **_how_it_went(answer, ttft, longest_gap))
        self._checkpoint(answer)

    def done(
        self, answer: Answer, usage: Mapping[str, Any], trims: list[events.Trimmed], *, saved: int, ttft: Optional[float],
        longest_gap: float, timings: Mapping[str, Any], cached: Optional[int], queued: float,
    ) -> None:  # fmt: skip
        """The answer is whole.

        Args:
            saved: tokens of it that were not decoded again.
            cached: tokens of the prompt that the server had in its cache, where it says.
            queued: seconds that the call waited for its turn.
        """
        if self._session is None or not self._number:
            return
        if self._attempts:
            self._attempts[-1].update(_how_it_went(answer, ttft, longest_gap))
        self._end(
            "done", answer=answer.as_record(), finish_reason=answer.finish_reason, usage=usage, timings=timings,
            saved_tokens=saved, trims=[_plain(trim) for trim in trims], cached_tokens=cached, queued=queued,
        )  # fmt: skip

    def ended(
        self, answer: Answer, error: BaseException, trims: Sequence[events.Trimmed] = (), *, ttft: Optional[float] = None,
        longest_gap: float = 0.0, queued: float = 0.0,
    ) -> None:  # fmt: skip
        """The call ends without a whole answer: by an error of ours, or because its caller left.

        Args:
            queued: seconds that the call waited for its turn.
        """
        if self._session is None or not self._number:
            return
        failed = isinstance(error, Exception)
        if self._attempts and "ended" not in self._attempts[-1]:  # it was cut off from outside
            what = str(error) if isinstance(error, LocalLLMError) else ""  # that of others may hold anything
            how = {"error": type(error).__name__, "detail": what} if failed else {}
            self._attempts[-1].update(how, **_how_it_went(answer, ttft, longest_gap))
        self._checkpoint(answer)
        self._end("failed" if failed else "cancelled", trims=[_plain(trim) for trim in trims], queued=queued)

    def _end(self, outcome: str, **what: Any) -> None:
        assert self._session is not None
        self._session.finish(self._number, outcome, attempts=self._attempts, **what)
        self._number = 0

    def _checkpoint(self, answer: Answer) -> None:
        if self._session is not None and self._number and answer.tokens:
            self._session.checkpoint(self._number, answer.as_record(), self._request)
            self._request = None  # once is enough


def _how_it_went(answer: Answer, ttft: Optional[float], longest_gap: float) -> dict[str, Any]:
    return {"ttft": ttft, "longest_gap": longest_gap, "tokens": answer.tokens, "ended": time.time()}


def _plain(trim: events.Trimmed) -> dict[str, Any]:
    return {field.name: getattr(trim, field.name) for field in dataclasses.fields(trim) if field.name != "call"}
