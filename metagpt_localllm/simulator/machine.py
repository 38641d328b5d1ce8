"""The machine that is simulated: how fast it is, what it remembers, what it has done."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Mapping, Sequence

__all__ = ["Machine", "PrefixCache", "Stats", "render", "seconds", "tokenize"]


@dataclass(frozen=True)
class Machine:
    """A model on a desktop; the defaults are those of a 34B model, quantized to 4 bits, half of it on the GPU.

    Attributes:
        prefill_speed: prompt tokens per second; infinite for none.
        decode_speed: answer tokens per second; infinite for none.
        load_time: seconds from the start of the server until the model is loaded.
        slots: requests that are worked on at once; the others queue.
        context: context window in tokens.
        prefix_cache: whether the beginning that a prompt shares with the last one costs nothing.
        gpu_share: part of the model in the memory of the GPU, 0 to 1.
        batch: prompt tokens between two looks whether the client is still there (llama.cpp's n_batch).
    """

    prefill_speed: float = 40.0
    decode_speed: float = 2.5
    load_time: float = 0.0
    slots: int = 1
    context: int = 4096
    prefix_cache: bool = True
    gpu_share: float = 0.5
    batch: int = 512


@dataclass
class Stats:
    """What the server has done.

    Attributes:
        requests: chat requests that arrived.
        prefill_tokens: prompt tokens processed, without those from the cache.
        cached_tokens: prompt tokens that the cache saved.
        decode_tokens: answer tokens generated.
        wasted_tokens: prefill and decode tokens of requests that ended without a whole answer.
        cancelled: requests whose client went away.
        completed: whole answers.
        faults: faults played, by kind.
    """

    requests: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    decode_tokens: int = 0
    wasted_tokens: int = 0
    cancelled: int = 0
    completed: int = 0
    faults: dict[str, int] = field(default_factory=dict)


_PIECE = re.compile(r"\s?[A-Za-z]{1,4}|\d|[\u0080-\U0010ffff]|\s+|[^\w\s]|_")


def tokenize(text: str) -> list[str]:
    """Splits text as a vocabulary would, roughly: word pieces of up to four letters, as in Llama 2's. Joined they are the text."""
    return _PIECE.findall(text)


def render(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[str]:
    """The tokens of a prompt as a chat template makes it (ChatML)."""
    tokens: list[str] = []
    if tools:
        tokens += tokenize(str(tools))
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(str(part.get("text", "<image>")) for part in content if isinstance(part, Mapping))
        tokens += ["<|im_start|>", str(message.get("role")), "\n", *tokenize(content), "<|im_end|>"]
    return [*tokens, "<|im_start|>", "assistant", "\n"]


class PrefixCache:
    """What a slot holds from the prompts before: the longest common beginning need not be processed again."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._held: list[list[str]] = []

    def shared(self, tokens: Sequence[str]) -> int:
        """How many of the first ``tokens`` are held; at least one token is always processed."""
        best = 0
        for held in self._held:
            same = 0
            for one, other in zip(held, tokens):
                if one != other:
                    break
                same += 1
            best = max(best, same)
        return min(best, max(len(tokens) - 1, 0))

    def hold(self, tokens: Sequence[str]) -> None:
        held = list(tokens)
        self._held = [held, *self._held][: self._slots]


def seconds(tokens: int, speed: float) -> float:
    """Time for ``tokens`` at ``speed`` tokens per second."""
    return 0.0 if math.isinf(speed) else tokens / speed
