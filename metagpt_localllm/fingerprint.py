"""Whether two requests are the same, or the same but for what every run makes anew (docs/resume.md). Pure.

A killed run is started again with the same command and asks the same questions, where MetaGPT has not written the time,
or a tool the address of an object, into a prompt. ``exact`` finds the same question, ``loose`` the same but for such
values, and :func:`still_holds` says whether an answer to the one may be given to the other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

__all__ = ["Fingerprint", "Part", "fingerprint", "part_of", "still_holds"]

#: Not part of a digest: how the answer is fetched and how long it may be, not what is asked.
_IGNORED = frozenset({"max_tokens", "max_completion_tokens", "stream", "stream_options", "timeout"})

_Kind = tuple[str, Sequence[str], "re.Pattern[str]"]
#: What is volatile: kind, texts without one of which there is none (a search for them is fast), and a pattern whose only
#: group is the value. Each wants the words around it, which the digest keeps: a date in a task is part of the task.
_KINDS: Sequence[_Kind] = tuple(
    (kind, needles, re.compile(pattern))
    for kind, needles, pattern in (
        # 1.0.0: RoleZero._get_prefix in roles/di/role_zero.py, COLLECT_AND_RANKURLS_PROMPT in actions/research.py.
        ("time", ["current time is 20"], r"current time is (20\d\d-\d\d-\d\d \d\d:\d\d:\d\d)(?!\d)"),
        # 1.0.0: EXTRA_INSTRUCTION in prompts/di/engineer2.py, the second in which the module was imported.
        ("time", ["{project_name}_1"], r"\{project_name\}_(1\d{9})(?!\d)"),
        # Both: new_filename in utils/file_repository.py and workspace.use_uid in configs/workspace_config.py, as files
        # and folders that a tool lists.
        ("time", ["/20"], r"/(20\d\d(?:0[1-9]|1[0-2])[0-3]\d[0-2]\d[0-5]\d[0-5]\d(?:-[0-9a-f]{8})?)(?![0-9A-Za-z-])"),
        # Python: repr of an object, in what a cell or a command prints.
        ("address", [" at 0x"], r" at 0x([0-9A-Fa-f]{6,16})(?![0-9A-Za-z])"),
        # Python: tempfile's names. A digit is wanted, which nine of ten have, so that /tmp/tmp_folders is not one. No
        # backslashes: in JSON a tab or the end of a line begins with one.
        ("name", ["/tmp"], r"/tmp(?=[a-z_]{0,7}[0-9])([a-z0-9_]{8})(?![A-Za-z0-9_])"),
        # Jupyter (ipykernel.compiler): the folder of the cells' sources has the kernel's process number.
        ("name", ["ipykernel_"], r"ipykernel_([0-9]{1,10})(?=/)"),
        # unittest, in what RunCode shows (QaEngineer), and pytest, in a terminal.
        ("duration", ["Ran "], r"Ran [0-9]+ tests? in ([0-9]+\.[0-9]{3}s)(?![0-9A-Za-z])"),
        ("duration", ["s ==", "s (0:"], r" in (?<=ed in |or in |rs in |gs in |ng in )([0-9]+\.[0-9]{2}s)(?= ==| \()"),
    )
)  # fmt: skip

#: What may have been told from a time or a duration, in whatever form; for folded answers.
_TELLS_TIME = re.compile(
    r"\b\d{1,2}:\d\d\b|\d\s*[ap]\.?m\b|\d\s*(?:o'clock|uhr|heure|hora|h)\b|\b\d{1,2}[-/.]\d{1,2}[-/.]\d\d(?:\d\d)?\b"
    r"|\d\s*[年月日号點点时時分秒]|星期|礼拜|周[一二三四五六日天]|[今明昨]天|早上|[上中下]午|晚上"
    r"|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day|\b(?:january|february|april|june|july|august|september|october|november"
    r"|december)\b|\b(?:jan|feb|mar|march|apr|may|jun|jul|aug|sep|sept|oct|nov|dec)\b[.,]*\s*\d"
    r"|\d(?:st|nd|rd|th)?\.?\s*(?:of\s+)?(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
    r"|\b(?:today|tonight|tomorrow|yesterday|morning|noon|afternoon|evening|midnight|weekend)\b"
    r"|\b(?:this|next|last) (?:week|month|year)\b"
)
_TELLS_DURATION = re.compile(
    r"\d\s*(?:[nuμm]?s|m?secs?|mins?|h)\b|(?:second|minute|hour)s?\b|秒|\b(?:fast|slow|quick|instant)"
)
_CALENDAR = re.compile(r"(20\d\d)-?(\d\d)-?(\d\d) ?(\d\d):?(\d\d):?(\d\d)(?:-[0-9a-f]{8})?")
_UNIX = re.compile(r"1\d{9}")
_DURATION = re.compile(r"\d+\.\d+s")
_PARTS = re.compile(r"[^\W_]+")
#: As many characters in a row of an old value are taken for the value; shorter values prove nothing.
_TELLING = 4
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
_DEEPEST = 100


@dataclass(frozen=True)
class Fingerprint:
    """Of one request.

    Attributes:
        exact: digest of the request as it is.
        loose: digest with a placeholder for each value that is volatile; the same as ``exact`` where there is none.
        volatile: these values, in the order of the request.
    """

    exact: str
    loose: str
    volatile: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """What one message contributes, so that of a long conversation only what is new is looked at."""

    exact: bytes
    loose: bytes
    volatile: tuple[str, ...]


def fingerprint(body: Mapping[str, Any], parts: Optional[Sequence[Part]] = None) -> Fingerprint:
    """Of a request in OpenAI's form, as MetaGPT gave it.

    The order of keys does not matter. ``max_tokens``, ``max_completion_tokens``, ``stream``, ``stream_options`` and
    ``timeout`` are not part of it: a run is to find its answers again when it is resumed with more patience.

    Args:
        parts: :func:`part_of` each message, where that is known already.
    """
    messages = body.get("messages")
    listed = isinstance(messages, (list, tuple))
    left_out = {*_IGNORED, "messages"} if listed else _IGNORED
    head = part_of({key: value for key, value in body.items() if key not in left_out})
    if parts is None:
        parts = [part_of(message) for message in messages or ()] if listed else ()
    exact = hashlib.sha256(head.exact + b"".join([part.exact for part in parts])).hexdigest()
    volatile = tuple(itertools.chain(head.volatile, *[part.volatile for part in parts if part.volatile]))
    if not volatile:
        return Fingerprint(exact, exact, ())
    loose = hashlib.sha256(head.loose + b"".join([part.loose for part in parts])).hexdigest()
    return Fingerprint(exact, loose, volatile)


def part_of(value: Any) -> Part:
    """Of one message."""
    text = _text(value)
    exact = _digest(text)
    found = sorted(
        (match.start(1), match.end(1), kind)
        for kind, needles, pattern in _KINDS
        if any(needle in text for needle in needles)
        for match in pattern.finditer(text)
    )
    if not found:
        return Part(exact, exact, ())
    parts, values, end = [], [], 0
    for start, stop, kind in found:
        if start >= end:
            # There is no such character in the text: nothing in a request looks like a placeholder.
            parts += [text[end:start], f"\x00{kind}\x00"]
            values.append(text[start:stop])
            end = stop
    return Part(exact, _digest("".join([*parts, text[end:]])), tuple(values))


def still_holds(answer_text: str, then: Sequence[str], now: Sequence[str]) -> bool:
    """Whether an answer to a request with the volatile values ``then`` may be given to one with ``now``.

    The two requests must have the same ``loose``. False when in doubt: where the answer has four characters in a row of
    a value that is another now, or anything that may have been told from a time or a duration; where a value is too
    short to be looked for; where two values were equal and are not now.

    Args:
        answer_text: all that was answered: with the tool calls' names and arguments, where there are any.
    """
    if tuple(then) == tuple(now):
        return True
    pairs = set(zip(then, now))
    if len(then) != len(now) or not len(pairs) == len(set(then)) == len(set(now)):
        return False
    answer = _folded(answer_text)
    return not any(old in answer_text or _shows(answer, _folded(old), _folded(new)) for old, new in pairs if old != new)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _shows(answer: str, old: str, new: str) -> bool:
    """Whether the answer may depend on the old value; all of them folded."""
    if len(old) < _TELLING or old in answer:
        return True
    if any(
        old[i : i + _TELLING] in answer and old[i : i + _TELLING] not in new for i in range(len(old) - _TELLING + 1)
    ):
        return True
    calendar = _CALENDAR.fullmatch(old)
    if calendar or _UNIX.fullmatch(old):
        return bool(_TELLS_TIME.search(answer)) or calendar is not None and _shows_calendar(answer, calendar, new)
    if _DURATION.fullmatch(old):
        return bool(_TELLS_DURATION.search(answer))
    parts = set(_PARTS.findall(old))
    return len(parts) > 1 and not (parts - set(_PARTS.findall(new))).isdisjoint(_PARTS.findall(answer))


def _shows_calendar(answer: str, old: re.Match[str], new: str) -> bool:
    """Whether the answer has the year, the day where it is another one now, or the time of day, in whatever language."""
    year, _, day, hour, minute, second = map(int, old.groups())
    numbers = [int(number) for number in re.findall(r"[0-9]{1,9}", answer)]
    same = _CALENDAR.fullmatch(new)
    if year in numbers or day in numbers and (same is None or same.groups()[:3] != old.groups()[:3]):
        return True
    told = {(hour, minute), (hour % 12 or 12, minute), (minute, second)}
    return not told.isdisjoint(zip(numbers, numbers[1:]))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _text(value: Any) -> str:
    """As text: another value, another text. Without NUL."""
    if isinstance(value, dict) and len(value) == 2:
        # As nearly all messages are: three times as fast as JSON, which never begins with this character.
        role, content = value.get("role"), value.get("content")
        if isinstance(role, str) and isinstance(content, str) and "\x1d" not in role and "\x00" not in role + content:
            return f"\x1d{role}\x1d{content}"
    return _canonical(value)


def _canonical(value: Any) -> str:
    """JSON, with text as it is: an escape such as \\u2026 must not read like a number."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError, RecursionError, OverflowError):
        # Keys that are no text, a number of thousands of digits, a list within itself.
        return json.dumps(_tame(value, ()), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """For what JSON does not know: its repr, without the address."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(_canonical, value))
    try:
        text = _ADDRESS.sub("", repr(value))
    except Exception:  # somebody else's code
        text = ""
    return [type(value).__qualname__, text]


def _tame(value: Any, above: tuple[int, ...]) -> Any:
    """The same with what ``json.dumps`` refuses made text."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return hex(value)
    if id(value) in above or len(above) > _DEEPEST:
        return ["…", type(value).__qualname__]
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else json.dumps(_tame(key, above)): _tame(item, above)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_tame(item, above) for item in value]
    return _plain(value)
