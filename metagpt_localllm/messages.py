"""The text in a chat message, which is a string or parts. Pure."""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence

__all__ = ["Message", "largest_text", "text_of", "with_text"]

Message = Mapping[str, Any]


def text_of(message: Message) -> str:
    """All of its text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping) and part.get("type") == "text")


def largest_text(message: Message) -> Optional[str]:
    """Its text, or the longest of its parts that are text; None where there is none."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    index = _largest_part(content)
    return None if index is None else str(content[index]["text"])  # type: ignore[index]


def with_text(message: Message, text: str) -> Message:
    """``message`` with ``text`` in the place of :func:`largest_text`."""
    content: Any = message["content"]
    if isinstance(content, str):
        return {**message, "content": text}
    index = _largest_part(content)
    parts = [{**part, "text": text} if position == index else part for position, part in enumerate(content)]
    return {**message, "content": parts}


def _largest_part(content: Any) -> Optional[int]:
    if not isinstance(content, Sequence):
        return None
    sizes = [
        (len(part["text"]), index)
        for index, part in enumerate(content)
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    ]
    return max(sizes)[1] if sizes else None
