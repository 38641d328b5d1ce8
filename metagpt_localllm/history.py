"""How fast each server and model has been: one estimator each, filled from the state file and from every attempt."""

from __future__ import annotations

from collections import deque
from typing import Deque, Optional, Sequence

from metagpt_localllm.calibration import Calibration
from metagpt_localllm.conversation import Conversations
from metagpt_localllm.latency import Estimator, Sample
from metagpt_localllm.messages import Message
from metagpt_localllm.state import State, state_at
from metagpt_localllm.transport import Endpoint

__all__ = ["History", "history_of"]

#: Prompts that are remembered for what a new one shares with them: about as many as a server's cache holds.
_REMEMBERED = 8
#: Seconds without a call after which a server may have unloaded its model (Ollama's keep_alive).
_UNLOADED_AFTER = 300.0

Messages = Sequence[Message]


class History:
    """What is known of one model on one server."""

    def __init__(self, endpoint: Endpoint, state: State) -> None:
        self._names = endpoint.address, endpoint.model
        self._state = state
        rows = state.samples(*self._names)
        self.estimator = Estimator(Sample.from_row(row) for row in rows)
        self.calibration = Calibration()
        self.conversations = Conversations(self.calibration)
        self._prompts: Deque[tuple[Messages, Sequence[float]]] = deque(maxlen=_REMEMBERED)
        self._used_at: Optional[float] = None

    def shared_tokens(self, messages: Messages) -> int:
        """Tokens at the beginning of a prompt that an earlier one had, too, so that the server may hold them (estimated)."""
        # What each of them shares is a beginning of the same messages: of the longest alone the tokens are told.
        shared = [(*_shared(earlier, messages), earlier, counts) for earlier, counts in tuple(self._prompts)]
        if not shared:
            return 0
        whole, characters, earlier, counts = max(shared, key=lambda one: one[:2])
        part = counts[whole] * characters / len(earlier[whole]["content"]) if characters else 0.0
        return int(sum(counts[:whole]) + part)

    def may_load(self, now: float) -> bool:
        """Whether the model may have to be loaded: nothing was asked of it for some minutes."""
        return self._used_at is None or now - self._used_at > _UNLOADED_AFTER

    def sent(self, messages: Messages, counts: Sequence[float]) -> None:
        """A prompt goes out; ``counts``: tokens of each message."""
        self._prompts.append((tuple(messages), counts))

    def record(self, sample: Sample, now: float) -> None:
        """Learns from an attempt, for now and for later runs."""
        if sample.ttft is not None:
            self._used_at = now
        self.estimator.observe(sample)
        self._state.add_sample(*self._names, sample.as_row())

    def forget_prompts(self) -> None:
        """The server was restarted: its cache is empty, and its model is to be loaded."""
        self._prompts.clear()
        self._used_at = None


def _shared(earlier: Messages, messages: Messages) -> tuple[int, int]:
    """How many whole messages they have in common at their beginnings, and how many characters of the next one."""
    whole = 0
    for one, other in zip(earlier, messages):
        if one is not other and one != other:
            left, right = one.get("content"), other.get("content")
            if isinstance(left, str) and isinstance(right, str) and one.get("role") == other.get("role"):
                return whole, _common(left, right)
            return whole, 0
        whole += 1
    return whole, 0


def _common(left: str, right: str) -> int:
    """Length of the beginning that two texts have in common, found by halving: whole slices are compared at once."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


_histories: dict[tuple[str, str], History] = {}


def history_of(endpoint: Endpoint, path: str) -> History:
    """The history of an endpoint, read from the state file at ``path`` when it is first asked for."""
    key = endpoint.base_url, endpoint.model
    if key not in _histories:
        _histories[key] = History(endpoint, state_at(path))
    return _histories[key]
