"""Shortens one text to a number of tokens, in linear time. Pure: counting is passed in.

What goes is replaced by a line that says how much it was. Cuts are at line ends; a fenced code block and a
JSON document stay or go whole, unless less than half of a side's room would be used then: a fence that is
cut is closed before the marker and opened again behind it. Only a line too long for that is cut itself. What
stays of the beginning depends on nothing behind it, so that a text that grows at its end keeps its head (and
a server the cache of it).
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from bisect import bisect_left
from functools import lru_cache
from typing import Callable, Iterable, Iterator, Literal, NamedTuple, Optional, Sequence

__all__ = ["Count", "Keep", "shorten"]

Count = Callable[[str], int]
Keep = Literal["both", "start", "end"]

#: A long line is broken at the first blank after so many characters, and after twice as many anywhere.
_PIECE = 120
#: So many pieces are counted together once more: the sum of single counts is off by more.
_CHUNK = 50
#: Results tried, each shaved by more than the one before, until the bare marker is the answer.
_ATTEMPTS = 8
#: Room is kept for this number in the marker, whatever it will be: the head must not depend on it.
_LARGEST = 9_999_999

_MARKER = "[… about {:,} tokens left out here to fit the context window …]"
_BARE = re.compile(r"\[… about [\d,]+ tokens left out here to fit the context window …\]\s*")
_LINE = re.compile(r"([^\n]*)(?:\n[\r\n]*|\Z)")  # with the empty lines that follow
_BREAK = re.compile(r"[\s。！？；，、]")
_FENCE = re.compile(r"([ \t]{0,40}(?:(?:[-*+]|\d{1,9}[.)])[ \t]{1,40})?)(`{3,}|~{3,})")  # may start a list's item
_JSON_START = r"\{\s*[\"}]|\[\s*(?:[\[{\"\]tfn]|-?\d+(?:[.eE]|\s*[,\]]))"  # `[2024-01-01 ...` is none
_OPENING = re.compile(rf"^(?:{_FENCE.pattern}([^\n]*)\n?|{_JSON_START})", re.MULTILINE)
_REST = re.compile(r"[ \t\r]*(?:\n|\Z)")
_JSON = json.JSONDecoder(parse_int=str, parse_float=str)  # no digits are computed: that is not linear
_TRUNCATED = 16  # characters; an error so near to the end of what was given may be due to that end


class _Block(NamedTuple):
    """A fenced block, or a JSON document: where it starts and ends, and where between it may be cut."""

    start: int
    inner: int
    close: int
    end: int
    opening: str = ""
    closing: str = ""


class _End(NamedTuple):
    """A place to cut: the tokens up to it, how bad it is (1: in a block, 2: in a line), a fence to add."""

    at: int
    tokens: float = 0
    badness: int = 0
    fence: str = ""


def shorten(text: str, target: int, count: Count, keep: Keep = "both") -> str:
    """``text`` with its middle (or end, or start) left out so that it has at most ``target`` tokens.

    The bare marker where not even that fits, and ``text`` itself where the marker is no shorter.
    """
    whole = count(text)
    if whole <= target or _BARE.fullmatch(text):
        return text
    room = max(target - count(f"\n{_MARKER.format(_LARGEST)}\n"), 0)
    head_room = {"both": room // 2, "start": room, "end": 0}[keep]
    heads = _ends(text, True, head_room, count)
    first = _best(heads, head_room, _End(0))
    tail_room = 0 if keep == "start" else room - first.tokens
    tails = _ends(text, False, tail_room, count)

    shaved = 0.0
    for attempt in range(_ATTEMPTS):
        # The tail gives way before the head does, which a server may have in its cache.
        head = first if shaved <= tail_room else _best(heads, head_room + tail_room - shaved, _End(0))
        tail = _best([end for end in tails if end.at > head.at], tail_room - shaved, _End(len(text)))
        start, end = text[: head.at], text[tail.at :]
        marker = _MARKER.format(max(whole - count(start + end), 1))
        newline = "" if not start or start.endswith("\n") else "\n"
        end = tail.fence + end
        result = start + newline + head.fence + marker + (f"\n{end}" if end else "")
        excess = count(result) - target
        if excess <= 0:
            return result
        shaved += excess * 2**attempt
    bare = _MARKER.format(max(whole, 1))
    return bare if count(bare) < whole else text


def _best(ends: Sequence[_End], room: float, nothing: _End) -> _End:
    """Of the cuts within ``room`` tokens the farthest, a better one preferred if it uses half of the room."""
    best = nothing
    for badness in range(3):
        best = next((end for end in reversed(ends) if end.badness <= badness and end.tokens <= room), nothing)
        if best.tokens * 2 >= room:
            break
    return best


def _ends(text: str, is_head: bool, room: float, count: Count) -> list[_End]:
    """The cuts within ``room`` tokens from the start of ``text``, or from its end; the nearest first."""
    if room <= 0:
        return []
    piece = min(_PIECE, max(12, int(room) // 20))
    cuts = _cuts(text, 0, len(text), piece) if is_head else _cuts_from_end(text, piece)
    measured = _measured(text, 0 if is_head else len(text), cuts, room, count)
    # What is a block in the head must not depend on what comes behind the head.
    blocks = _blocks(text, measured[-1][0] if is_head else len(text))
    starts = [block.start for block in blocks]
    extra = lru_cache(maxsize=None)(count)
    ends = []
    for at, tokens in measured:
        index = bisect_left(starts, at) - 1
        block = blocks[index] if index >= 0 and at < blocks[index].end else None
        if not 0 < at < len(text) or block and not block.inner + is_head <= at <= block.close - (not is_head):
            continue  # nothing would be kept, or gone; or in a fence itself, or with nothing inside of it
        fence = "" if block is None else block.closing if is_head else block.opening
        badness = 2 if text[at - 1] != "\n" else 0 if block is None else 1
        ends.append(_End(at, tokens + (extra(fence) if fence else 0), badness, fence))
    return ends


def _measured(text: str, origin: int, cuts: Iterable[int], room: float, count: Count) -> list[tuple[int, float]]:
    """Each of ``cuts`` with the tokens between ``origin`` and it, up to the first that is beyond ``room``."""
    measured: list[tuple[int, float]] = [(origin, 0)]
    chunk: list[tuple[int, float]] = []  # since the last of ``measured``, by the sum of single counts
    at, weight = origin, 0.0

    def flush() -> float:
        last, used = measured[-1]
        scale = count(text[min(last, at) : max(last, at)]) / weight if len(chunk) > 1 else 1.0
        measured.extend((cut, used + part * scale) for cut, part in chunk)
        chunk.clear()
        return measured[-1][1]

    used = 0.0
    for cut in cuts:
        weight += count(text[min(at, cut) : max(at, cut)]) or 0.5
        at = cut
        chunk.append((cut, weight))
        if used + weight > room or len(chunk) == _CHUNK:
            used, weight = flush(), 0
            if used > room:
                break
    if chunk:
        flush()
    return measured


def _cuts(text: str, start: int, end: int, piece: int) -> Iterator[int]:
    """Line ends from ``start`` to ``end``, and places within lines longer than ``piece`` characters.

    A place depends only on what is before it. None makes a fence of what it leaves of a line.
    """
    for line in _LINE.finditer(text, start, end):
        stop = line.end(1)
        at = _behind_fence(text, line.start(), stop)
        while stop - at > piece:
            blank = _BREAK.search(text, at + piece, min(at + 2 * piece, stop))
            cut = blank.end() if blank else at + 2 * piece
            if cut >= stop:
                break
            while cut > at + piece // 2 and _is_joined(text, cut):
                cut -= 1
            if _behind_fence(text, cut, stop) < stop:
                yield cut
            at = cut
        if line.end() > line.start():
            yield line.end()


def _cuts_from_end(text: str, piece: int) -> Iterator[int]:
    end = len(text)
    while end > 0:
        start = text.rfind("\n", 0, max(end - 4000, 0)) + 1
        yield from [*_cuts(text, start, end, piece)][-2::-1]
        yield start
        end = start


def _behind_fence(text: str, at: int, stop: int) -> int:
    """``at``, or where what looks like a fence there is none any more: after one more backtick, or at ``stop``."""
    fence = _FENCE.match(text, at, stop)
    if not fence:
        return at
    return stop if fence[2][0] == "~" else text.find("`", fence.end(), stop) + 1 or stop


def _is_joined(text: str, at: int) -> bool:
    """Whether the character at ``at`` belongs to the one before: an accent, half of a pair, an emoji's part."""
    character = text[at]
    is_part = "\udc00" <= character <= "\udfff" or "\U0001f3fb" <= character <= "\U0001f3ff"
    return is_part or "\u200d" in text[at - 1 : at + 1] or unicodedata.category(character)[0] == "M"


def _blocks(text: str, limit: int) -> list[_Block]:
    """Fenced blocks and JSON documents that start before ``limit``; one that lasts beyond has no end."""
    blocks = []
    fence: Optional[_Block] = None
    indent = marks = ""
    searched = 0  # for JSON, up to here
    for line in _OPENING.finditer(text, 0, limit):
        at = line.start()
        if fence:
            # Within a list, a fence is indented as its item is.
            bare = line[2] and line[2].startswith(marks) and not (line[1] + line[3]).strip()
            if bare and len(line[1]) <= len(indent) + 3:
                blocks.append(fence._replace(close=at, end=line.end()))
                fence = None
        elif line[2]:
            indent, marks, info = line.groups()
            if marks[0] == "~" or "`" not in info:
                opening = f"{indent}{marks}{info[:100].rstrip()}\n"
                closing = re.sub(r"\S", " ", indent) + f"{marks}\n"
                fence = _Block(at, line.end(), sys.maxsize, sys.maxsize, opening, closing)
        elif at >= searched:
            is_json, searched = _json(text, at, limit)
            if is_json:
                blocks.append(_Block(at, at, searched, searched))
    return [*blocks, fence] if fence else blocks


def _json(text: str, start: int, limit: int) -> tuple[bool, int]:
    """Whether whole lines from ``start`` are a JSON document, and up to where that was searched."""
    size = 512
    while True:
        part = text[start : min(start + size, limit)]
        try:
            end = start + _JSON.raw_decode(part)[1]
        except json.JSONDecodeError as error:
            if error.pos < len(part) - _TRUNCATED and not error.msg.startswith("Unterminated"):
                return False, start + error.pos
        except RecursionError:
            return False, sys.maxsize
        else:
            rest = _REST.match(text, end, limit)
            return rest is not None, rest.end() if rest else end
        if start + size >= limit:
            return True, sys.maxsize
        size *= 4
