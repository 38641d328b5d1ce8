"""Fits a list of messages into a number of tokens. Pure: counting is passed in.

Kept are the system messages and the latest message; of the others the oldest go first, whole, a tool
call together with its answers. Only when that is not enough does a message lose its middle, the
largest first, with a marker that says how much is gone. The result is never larger than what was
given, and fitting a fitted list changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Sequence, Union

__all__ = ["Fitted", "Message", "fit"]

Message = Mapping[str, Any]

#: Below this many characters a message is not worth cutting: little would be left beside the marker.
_SHORTEST_CUT = 200


@dataclass(frozen=True)
class Fitted:
    """What is sent, and what it cost.

    Attributes:
        messages: the messages that remain, in their order.
        dropped: how many messages are gone whole.
        shortened: how many lost their middle.
        removed_tokens: tokens saved, by the count that was passed in.
        tokens: tokens of what remains, by the same count.
        fits: whether ``tokens`` is within the budget.
    """

    messages: list[Message]
    dropped: int
    shortened: int
    removed_tokens: int
    tokens: int
    fits: bool


def fit(messages: Sequence[Message], budget: int, count: Callable[[Message], int]) -> Fitted:
    """Fits ``messages`` into ``budget`` tokens as counted by ``count``, message by message."""
    before = sum(count(message) for message in messages)
    if before <= budget:
        return Fitted(list(messages), 0, 0, 0, before, True)

    kept: dict[int, Message] = dict(enumerate(messages))
    tokens = before
    for unit in _units(messages):
        if tokens <= budget:
            break
        if len(messages) - 1 not in unit and not _is_system(messages[unit[0]]):
            tokens -= sum(count(kept.pop(index)) for index in unit)

    shortened: set[int] = set()
    for index in sorted(kept, key=lambda i: (_is_system(kept[i]), -count(kept[i]))):
        while tokens > budget:  # a message of several parts may have to lose more than one middle
            shorter = _lose_middle(kept[index], count(kept[index]) - (tokens - budget), count)
            if shorter is None:
                break
            tokens += count(shorter) - count(kept[index])
            kept[index] = shorter
            shortened.add(index)
    remaining = list(kept.values())
    return Fitted(remaining, len(messages) - len(kept), len(shortened), before - tokens, tokens, tokens <= budget)


def _is_system(message: Message) -> bool:
    return message.get("role") in ("system", "developer")


def _units(messages: Sequence[Message]) -> list[list[int]]:
    """Positions of messages that go together: a tool call with its answers, any other message alone."""
    units: list[list[int]] = []
    callers: dict[str, list[int]] = {}
    latest: Optional[list[int]] = None
    for index, message in enumerate(messages):
        # An answer that names no call, or one unknown, belongs to what came right before it.
        caller = callers.get(str(message.get("tool_call_id")), latest) if message.get("role") == "tool" else None
        if caller is not None:
            caller.append(index)
            continue
        unit = [index]
        units.append(unit)
        if not _is_system(message):
            latest = unit
        for call in message.get("tool_calls") or ():
            if isinstance(call, Mapping):
                callers[str(call.get("id"))] = unit
    return units


def _lose_middle(message: Message, target: int, count: Callable[[Message], int]) -> Optional[Message]:
    """``message`` with the least taken out of its middle so that it counts at most ``target`` tokens.

    Where even the shortest form is too long, that form; None where nothing can be taken.
    """
    text = _text(message)
    if text is None or len(text) < _SHORTEST_CUT:
        return None
    whole = count(message)

    def cut(keep: int) -> Message:
        head = _line_end(text, keep // 2)
        tail = _line_start(text, len(text) - (keep - keep // 2), head)
        bare = count(_with_text(message, text[:head] + text[tail:]))
        marker = f"\n[… about {max(whole - bare, 1):,} tokens left out here to fit the context window …]\n"
        return _with_text(message, text[:head] + marker + text[tail:])

    low, high = 0, len(text)  # cut(low) may be too long still; cut(high) is not short enough
    while high - low > 1:
        middle = (low + high) // 2
        if count(cut(middle)) <= target:
            low = middle
        else:
            high = middle
    shorter = cut(low)
    return shorter if count(shorter) < whole else None


def _line_end(text: str, at: int) -> int:
    """The end of the last line that ends in the second half before ``at``; ``at`` where there is none."""
    newline = text.rfind("\n", at // 2, at)
    return newline if newline > 0 else at


def _line_start(text: str, at: int, head: int) -> int:
    newline = text.find("\n", at, at + (len(text) - at) // 2)
    return max(newline + 1 if newline >= 0 else at, head)


def _text(message: Message) -> Optional[str]:
    content = message.get("content")
    if isinstance(content, str):
        return content
    largest = _largest_text_part(content)
    return None if largest is None else str(content[largest]["text"])  # type: ignore[index]


def _largest_text_part(content: Any) -> Optional[int]:
    if not isinstance(content, Sequence):
        return None
    sizes = [
        (len(part["text"]), index)
        for index, part in enumerate(content)
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    ]
    return max(sizes)[1] if sizes else None


def _with_text(message: Message, text: str) -> Message:
    content: Union[str, list[Any]] = text
    if not isinstance(message["content"], str):
        content = list(message["content"])
        index = _largest_text_part(content)
        assert index is not None
        content[index] = {**content[index], "text": text}
    return {**message, "content": content}
