"""What every complaint and every number must be, whatever came in."""

from __future__ import annotations

import unicodedata

import httpx

__all__ = ["KEY", "REQUEST", "fits_a_line", "is_a_count"]

REQUEST = httpx.Request("POST", "http://127.0.0.1:1/v1/chat/completions")
#: The API key, which must never be seen.
KEY = "sk-0123456789abcdef"


def fits_a_line(text: str, longest: int = 1500) -> None:
    """One line of a bounded length, which nothing in it ends or moves, and without the key."""
    assert len(text) <= longest, len(text)
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text), text
    assert KEY not in text, text


def is_a_count(number: object) -> bool:
    """A whole number that arithmetic can use."""
    return isinstance(number, int) and 0 <= number <= 10**16
