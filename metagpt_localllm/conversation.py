"""What is remembered of conversations: their messages, what each counts, and how they were cut. No I/O, no clock.

MetaGPT sends a growing list of messages again and again. The one that was sent last is found again by its beginning, so
that only what is new is counted, and a cut once made stays as it is: the prompt then grows only at its end.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import operator
import re
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Sequence

from metagpt_localllm.calibration import Calibration, Script, by_script, script_of
from metagpt_localllm.fingerprint import Part, part_of
from metagpt_localllm.messages import Message, text_of
from metagpt_localllm.tokens import MESSAGE_TOKENS, estimate_message, estimate_text
from metagpt_localllm.trimming import Change

__all__ = ["Conversation", "Conversations", "Size", "size_of"]

#: Conversations that are remembered for one model: more than roles that talk in turn.
_REMEMBERED = 16
#: What a count is off by, at the most, that is a message's share of what several messages counted together.
_SHARE = 1.25
#: Messages at the end that may differ between one call and the next: agents end their prompts with their present state.
_TRANSIENT = 2
#: Messages that conversations must share for one to be cut as the other was: the system's and the task are common to many.
_SAME = 3

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")
_IDEOGRAPH = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True)
class Size:
    """What is known of a message's size before anyone counts.

    Attributes:
        parts: tokens as estimated, by script: of its text, and as "frame" of the template's and of tool calls.
        text: tokens of its text as estimated.
        images: tokens of its images, of which nobody but the server knows better.
        most: tokens that it has at the most, since none is shorter than a byte; infinite with images.
        least: tokens that it has at the least: one for a word, since none goes over a blank, and one for four ideographs.
            Thoughts are left out, as templates leave them out of earlier turns; so are tool calls, digits and signs, of
            which vocabularies have long runs.
    """

    parts: Mapping[Script, int]
    text: int
    images: int
    most: float
    least: int

    @property
    def rest(self) -> int:
        """Tokens of all but the text."""
        return self.parts.get("frame", 0) + self.images


def size_of(message: Message, count_text: Callable[[str], int] = estimate_text) -> Size:
    content, text = message.get("content"), text_of(message)
    # A tokenizer's own count needs no telling scripts apart.
    parts = by_script(text) if count_text is estimate_text else {script_of(text): count_text(text)}
    frame = estimate_message({**message, "content": None})
    if content is not None and not isinstance(content, (str, list, tuple)):
        frame += estimate_text(str(content))
    images = 0
    most: float = len(text.encode("utf-8", "replace")) + 2 * MESSAGE_TOKENS
    if frame > MESSAGE_TOKENS:
        most += len(json.dumps({**message, "content": None}, default=str))  # templates render tool calls in their own ways
    if isinstance(content, (list, tuple)):
        images = max(estimate_message({"content": content}) - MESSAGE_TOKENS - estimate_text(text), 0)
        most = math.inf if images else most
    said = _THOUGHT.sub("", text)
    least = len(_WORD.findall(said)) + len(_IDEOGRAPH.findall(said)) // 4
    return Size({**parts, "frame": frame}, sum(parts.values()), images, most, least)


class Conversation:
    """A list of messages, what of it is sent, and what that counts.

    Attributes:
        sent: the messages that go to the server, in order; some may be left out or shortened.
        window: context window in tokens for which it was cut, or None.
        parts: what each of its messages contributes to a request's fingerprint.
    """

    def __init__(self, tools: str, calibration: Calibration, count_text: Callable[[str], int], distrust: float = 1.0) -> None:
        self._tools = tools
        self._calibration = calibration
        self._count_text = count_text
        self._distrust = distrust
        self._frame = MESSAGE_TOKENS + (math.ceil(estimate_text(tools) * calibration.factor("code")) if tools else 0)
        self._frame_most = 2 * MESSAGE_TOKENS + 2 * len(tools.encode("utf-8", "replace"))
        self._messages: list[Message] = []  # as they were given
        self._sizes: list[Size] = []
        self.parts: list[Part] = []
        self._counts: list[float] = []  # tokens of each as it is sent
        self._shared: list[bool] = []  # whether its count is its share of what the server counted
        self._changes: dict[int, Change] = {}
        self._saved: dict[int, float] = {}  # tokens that each change took away
        self._known = 0  # so many of those sent count together exactly what the server said
        self._known_tokens = 0
        self.sent: list[Message] = []
        self._positions: list[int] = []  # of those sent
        self.window: Optional[int] = None
        self._origin: tuple[Optional[Conversation], int] = None, 0  # what it goes on with, and how far

    # ------------------------------------------------------------------ growing

    def grown(self, messages: Sequence[Message], common: int, distrust: float) -> Conversation:
        """The conversation that begins with the first ``common`` messages of this one and goes on as ``messages`` does."""
        new = Conversation(self._tools, self._calibration, self._count_text, distrust)
        new._messages, new._sizes = self._messages[:common], self._sizes[:common]
        new.parts = self.parts[:common]
        new._counts, new._shared = self._counts[:common], self._shared[:common]
        new._frame = self._frame
        if common == len(messages) == len(self._messages):
            new._changes = dict(self._changes)
        elif common >= _SAME:
            # What is the latest message now, with its tool call, was not that then.
            end = min(common, _start_of_latest(messages))
            whole = max(self._changes, default=-1) < end
            new._changes = dict(self._changes) if whole else {i: c for i, c in self._changes.items() if i < end}
        kept = len(new._changes) == len(self._changes)
        new._saved = dict(self._saved) if kept else {i: self._saved[i] for i in new._changes}
        lost = set() if kept else self._changes.keys() - new._changes.keys()
        for i in lost:
            new._restore(i, common)
        new.window = self.window if new._changes else None
        if common == len(self._messages) and not lost:
            new.sent, new._positions = self.sent[:], self._positions[:]
        else:
            new._lay_out(0)
        end = self._positions[self._known - 1] if self._known else common
        if end < common and not any(i <= end for i in lost):
            new._known, new._known_tokens = self._known, self._known_tokens
        new._add(messages[common:])
        return new

    def _add(self, messages: Sequence[Message]) -> None:
        for position in self._positions[self._known :]:  # more may have been learned since
            if not self._shared[position]:
                self._counts[position] = self._estimate(self._sizes[position])
        start = len(self._messages)
        for message in messages:
            self._messages.append(_copied(message))
            size = size_of(message, self._count_text)
            self._sizes.append(size)
            self.parts.append(part_of(message))
            self._counts.append(self._estimate(size))
            self._shared.append(False)
        self._lay_out(start)

    def _lay_out(self, start: int) -> None:
        for position in range(start, len(self._messages)):
            message = self._changes.get(position, self._messages[position])
            if message is not None:
                self.sent.append(message)
                self._positions.append(position)

    def _lay_out_anew(self) -> None:
        self.sent, self._positions = [], []
        self._known = self._known_tokens = 0
        self._lay_out(0)

    def _estimate(self, size: Size) -> float:
        return (self._calibration.upper(size.parts) + size.images) * self._distrust

    # ------------------------------------------------------------------ counting

    @property
    def changed(self) -> int:
        """Messages that are left out of it or shortened."""
        return len(self._changes)

    @property
    def whole(self) -> float:
        """Tokens that it would have if nothing were cut."""
        return self.tokens + sum(self._saved.values())

    @property
    def known(self) -> bool:
        """Whether the server itself has counted all that is sent."""
        return bool(self.sent) and self._known == len(self.sent)

    @property
    def tokens(self) -> int:
        """Tokens of what is sent, with the tools and the template's opening of the answer."""
        rest = sum(self._counts[position] for position in self._positions[self._known :])
        return math.ceil((self._known_tokens or self._frame) + rest)

    @property
    def most(self) -> float:
        """Tokens that it has at the most."""
        total: float = self._known_tokens or self._frame_most
        for position in self._positions[self._known :]:
            total += self._counts[position] * _SHARE if self._shared[position] else self._sizes[position].most
        return total

    @property
    def least(self) -> float:
        """Tokens that it has at the least."""
        total = float(self._known_tokens)
        for position in self._positions[self._known :]:
            size = self._sizes[position]
            total += self._counts[position] / _SHARE if self._shared[position] else size.least
        return total

    @property
    def frame(self) -> int:
        """Tokens that belong to no message."""
        return self._frame

    def doubt(self, factor: float) -> None:
        """The server has shown that the counts are too low, and not by how much."""
        self._distrust *= factor
        self._counts = [count * factor for count in self._counts]
        self._known = self._known_tokens = 0

    def recount(self) -> None:
        """What the server counted was not all of it."""
        self._shared = [False] * len(self._messages)
        self._known = self._known_tokens = 0
        self._counts = [self._estimate(size) for size in self._sizes]

    def counts(self) -> list[float]:
        """Tokens of each message that is sent."""
        return [self._counts[position] for position in self._positions]

    def counted(self, tokens: int) -> None:
        """The server has counted what is sent now: that teaches what its messages count, and how to estimate others."""
        if self.known and tokens == self._known_tokens:
            return
        group = self._positions[self._known :] or self._positions
        before = self._known_tokens if len(group) < len(self._positions) else 0
        estimated = sum(self._counts[position] for position in group)
        share = tokens - (before or self._frame)
        if share <= estimated / 10 and not before:
            # The tools count far less than was thought, and the messages as they do.
            self._frame = max(round(tokens - estimated), 0)
            share = tokens - self._frame
        if share <= 0 or estimated <= 0:
            return
        if not self._tools and not any(self._shared[position] or self._sizes[position].images for position in group):
            estimates: dict[Script, int] = {}
            for position in group:
                for script, size in self._sizes[position].parts.items():
                    estimates[script] = estimates.get(script, 0) + size
            self._calibration.observe(estimates, share)
        for position in group:
            self._counts[position] *= share / estimated
            self._shared[position] = True
        self._known, self._known_tokens = len(self.sent), tokens

    # ------------------------------------------------------------------ cutting

    def positions(self) -> list[tuple[int, Message]]:
        """What is sent, each with its position."""
        return list(zip(self._positions, self.sent))

    def count(self, position: int, message: Message) -> float:
        """Tokens of ``message`` in the place of the one at ``position``, by what that one counts."""
        current = self._changes.get(position, self._messages[position])
        if message is current:
            return self._counts[position]
        return self.count_text_at(position, text_of(message)) + self._sizes[position].rest

    def count_text_at(self, position: int, text: str) -> float:
        """Tokens of a part of the text of the message at ``position``."""
        size = self._sizes[position]
        density = max(self._counts[position] - size.rest, 1.0) / size.text if size.text else self._distrust
        return self._count_text(text) * density

    def cut(self, changes: Mapping[int, Change], window: int) -> None:
        """Takes ``changes`` over, for this and all later calls."""
        for position, message in changes.items():
            before = self._counts[position]
            if message is not None:
                self._counts[position] = self.count(position, message)
                self._sizes[position] = size_of(message, self._count_text)
            saved = before - (self._counts[position] if message is not None else 0)
            self._saved[position] = self._saved.get(position, 0.0) + saved
        self._changes.update(changes)
        self.window = window
        self._lay_out_anew()

    def _restore(self, position: int, length: int) -> None:
        """Counts the message at ``position`` as it was given."""
        if position < length:
            self._sizes[position] = size_of(self._messages[position], self._count_text)
            self._counts[position] = self._estimate(self._sizes[position])
            self._shared[position] = False

    def uncut(self) -> None:
        """All of it is sent again: there is more room than when it was cut."""
        for position, change in self._changes.items():
            if change is not None:
                self._restore(position, len(self._messages))
        self._changes.clear()
        self._saved.clear()
        self.window = None
        self._lay_out_anew()


class Conversations:
    """The conversations with one model."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._kept: list[Conversation] = []

    def open(
        self, messages: Sequence[Message], tools: Any, count_text: Callable[[str], int] = estimate_text, distrust: float = 1.0
    ) -> Conversation:
        """The conversation that ``messages`` is, as far as it is remembered; it is kept with :meth:`keep`."""
        rendered = json.dumps(tools, ensure_ascii=False, default=str) if tools else ""
        best, common = Conversation(rendered, self._calibration, count_text, distrust), 0
        for earlier in reversed(self._kept):
            if earlier._tools == rendered and earlier._count_text is count_text:
                same = _common(earlier._messages, messages)
                if same > common:
                    best, common = earlier, same
        conversation = best.grown(messages, common, distrust)
        conversation._origin = best, common
        return conversation

    def forget(self) -> None:
        self._kept.clear()

    def keep(self, conversation: Conversation) -> None:
        """Remembers it instead of those that it goes on with, but for their last messages."""
        messages, (origin, known) = conversation._messages, conversation._origin
        conversation._origin = None, 0

        def is_superseded(earlier: Conversation) -> bool:
            if earlier is conversation or earlier._tools != conversation._tools:
                return earlier is conversation
            length = len(earlier._messages)
            common = known if earlier is origin else _common(earlier._messages, messages)
            return common == length or common >= max(length - _TRANSIENT, _SAME)

        self._kept = [earlier for earlier in self._kept if not is_superseded(earlier)][-_REMEMBERED + 1 :]
        self._kept.append(conversation)


def _common(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many messages both begin with."""
    differ = map(operator.ne, one, other)
    return next(itertools.compress(itertools.count(), differ), min(len(one), len(other)))


def _start_of_latest(messages: Sequence[Message]) -> int:
    """Position of the latest message, or of the tool call that it answers."""
    position = len(messages) - 1
    while position > 0 and messages[position].get("role") == "tool":
        position -= 1
    return position


def _copied(message: Message) -> Message:
    """The caller may change its own later."""
    if all(isinstance(value, str) for value in message.values()):
        return dict(message)
    try:
        return copy.deepcopy(dict(message))
    except Exception:  # something odd in it that cannot be copied
        return dict(message)
